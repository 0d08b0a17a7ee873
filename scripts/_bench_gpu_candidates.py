"""What the GPU benchmark compares: our implementations, in their defaults and swept."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import eqx_paged

from ._bench_gpu_cases import BenchCase
from ._bench_gpu_data import Data
from ._bench_gpu_timer import Prepared


class NotHere(Exception):
    """Why an implementation is absent, or does not take a case."""


class Candidate(NamedTuple):
    """Something to be timed; `prepare` raises `NotHere` where that cannot be."""

    implementation: str
    config: str  # empty for the defaults
    prepare: Callable[[], Prepared]


# What `q` and pools of 8-bit numbers are multiplied with.
SCALE = 1.0


def ours(
    case: BenchCase, data: Callable[[], Data], *, interpret: bool
) -> Iterator[Candidate]:
    """Each of our implementations as it comes."""
    for name, options in IMPLEMENTATIONS.items():
        yield _candidate(case, data, name, "", options, interpret=interpret)


def swept(
    case: BenchCase, data: Callable[[], Data], *, interpret: bool
) -> Iterator[Candidate]:
    """The Triton kernel with each of a few configs."""
    splits = (None, 0) if case.is_decode else (None,)
    for block_size, num_stages, num_splits in itertools.product(
        (32, 64, 128), (3, 5, 7), splits
    ):
        chosen = dict(block_size=block_size, num_stages=num_stages)
        if num_splits is not None:
            chosen["num_splits"] = num_splits
        text = ", ".join(f"{name} {value}" for name, value in chosen.items())
        config = eqx_paged.TritonConfig(**chosen)
        options = dict(implementation="pallas_gpu", config=config)
        yield _candidate(case, data, "triton", text, options, interpret=interpret)


IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "xla": dict(implementation="xla"),
    "triton": dict(implementation="pallas_gpu", config=eqx_paged.TritonConfig()),
    "mosaic": dict(implementation="pallas_gpu", config=eqx_paged.MosaicGPUConfig()),
}


def as_run(options: dict[str, Any], *, interpret: bool) -> dict[str, Any]:
    """The options of a call, which is interpreted or not."""
    if options["implementation"] == "xla":
        return options
    config = options["config"]
    if interpret and config.num_splits is None:
        # Each part that there might be is a program, and each takes long.
        config = dataclasses.replace(config, num_splits=2)
    return options | dict(interpret=interpret, config=config)


def _candidate(
    case: BenchCase,
    data: Callable[[], Data],
    name: str,
    text: str,
    options: dict[str, Any],
    *,
    interpret: bool,
) -> Candidate:
    options = as_run(options, interpret=interpret)
    if case.dtype != "bfloat16":
        options = options | dict(k_scale=SCALE, v_scale=SCALE)

    def prepare() -> Prepared:
        step = functools.partial(_decode if case.is_decode else _mixed, options)
        return Prepared(step, *data())

    return Candidate(name, text, prepare)


def _decode(options, q, pool, addresses) -> Any:
    k, v = pool
    return eqx_paged.paged_attention(
        q, k, v, addresses.kv_lens, addresses.page_indices, **options
    )


def _mixed(options, q, pool, addresses) -> Any:
    k, v = pool
    return eqx_paged.ragged_paged_attention(q, k, v, *addresses, **options)
