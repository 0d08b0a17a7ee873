"""Compiles for a TPU where there is none: libtpu is installed, and a CPU is enough."""

import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._tpu_chips import CHIPS


def chips_of(generation: str) -> np.ndarray:
    """The devices of a small topology, to be compiled for."""
    # The first is for the loading of libtpu, and the second allows several processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[generation].topology
    )
    return np.array(topology.devices)


def compile_for(
    generation: str, function: Callable, args: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """`function` for one chip of a generation, by the real compiler."""
    mesh = Mesh(chips_of(generation)[:1], ("chip",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
    )
    # The mesh in scope says which TPU is lowered for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, donate_argnums=donate).trace(*args)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def large_copies(compiled: jax.stages.Compiled, least: int | np.integer) -> list[int]:
    """Copies and transpositions of at least `least` numbers."""
    pattern = r"= \(?\w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\("
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(pattern, compiled.as_text() or "")
    ]
    return [size for size in sizes if size >= least]
