"""TPU kernels without a TPU: interpreted on the CPU, raced, and compiled ahead of time."""

import importlib.util
import os
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec


TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "7x": "tpu7x:2x2x1",
}
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
both_dma_modes = pytest.mark.parametrize("dma_execution_mode", ("on_wait", "eager"))


def races_of(call, dma_execution_mode):
    """Runs `call(interpret)`. Returns its result, and whether two accesses raced."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    pltpu.reset_tpu_interpret_mode_state()
    mode = pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma_execution_mode)
    try:
        result = jax.block_until_ready(call(mode))
    except jax.errors.JaxRuntimeError as error:  # as jax 0.12 tells it
        if "RACE DETECTED" not in str(error):
            raise
        return None, True
    return result, interpret_pallas_call.races.races_found


def compile_for(generation, function, args, donate=()):
    """`function` for one chip of a generation, by the real compiler."""
    # The first is for the loading of libtpu, and the second allows several workers.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[generation]
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in args]
    # The mesh in scope says which TPU is lowered for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, donate_argnums=donate).trace(*args)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def large_copies(compiled, least):
    """Copies and transpositions of at least `least` numbers."""
    pattern = r"= \(?\w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\("
    sizes = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(pattern, compiled.as_text())
    ]
    return [size for size in sizes if size >= least]
