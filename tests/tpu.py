"""TPU kernels without a TPU: interpreted on the CPU, raced, and compiled ahead of time."""

import contextlib
import importlib.util
import io

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu
from scripts._tpu_chips import CHIPS
from scripts._tpu_compile import (
    chips_of as chips_of,
    compile_for as compile_for,
    large_copies as large_copies,
)


TOPOLOGIES = {name: chip.topology for name, chip in CHIPS.items()}
# What decides the shape of a kernel: heads, kv heads and head_dim of published models.
MODELS = {
    "8b": (32, 8, 128),
    "7b": (28, 4, 128),
    "4b": (8, 4, 256),
    "135m": (9, 3, 64),
    "mha": (32, 32, 128),
}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler, is not installed",
)
RACE = "RACE DETECTED"
both_dma_modes = pytest.mark.parametrize("dma_execution_mode", ("on_wait", "eager"))


def races_of(call, dma_execution_mode):
    """Runs `call(interpret)`. Returns its result, and whether two accesses raced."""
    pltpu.reset_tpu_interpret_mode_state()
    mode = pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma_execution_mode)
    # It is printed, since what the interpreter remembers is of the last kernel alone.
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            result = jax.block_until_ready(call(mode))
    except jax.errors.JaxRuntimeError as error:  # as jax 0.12 tells it
        if RACE not in str(error):
            raise
        return None, True
    return result, RACE in printed.getvalue()


def copies_in(call, monkeypatch):
    """How many copies a call starts, as it is interpreted."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    starts = []
    start = interpret_pallas_call.dma_start

    def counted(*args, **kwargs):
        starts.append(args)
        return start(*args, **kwargs)

    monkeypatch.setattr(interpret_pallas_call, "dma_start", counted)
    jax.block_until_ready(call(pltpu.InterpretParams()))
    return len(starts)
