"""Compiles for an NVIDIA GPU where there is none: JAX's plugin and ptxas are enough."""

import importlib.metadata
import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from ._gpu_kernels import GPUKernel, kernels_in
from ._gpu_targets import TARGETS


# Whose versions decide what is compiled.
PACKAGES = ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
_OPTIONS = {
    "xla_gpu_autotune_level": 0,  # which would run candidates
    "xla_dump_hlo_as_text": True,
    "xla_dump_emitter_re": "ptx",
}


class Compiled(NamedTuple):
    """A program, and the kernels that it launches."""

    program: jax.stages.Compiled
    kernels: tuple[GPUKernel, ...]


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    for package in PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed; the extra gpu-aot has it"
    if not _ptxas().exists():
        return f"there is no {_ptxas()}"
    return None


def versions() -> dict[str, str]:
    """Of what compiles."""
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def compile_for(
    architecture: str, function: Callable, args: Any, donate: tuple[int, ...] = ()
) -> Compiled:
    """`function` for one GPU of an architecture, by the real compiler.

    **Arguments:**

    - `architecture`: one of `TARGETS`.
    - `args`: arrays, or what says their shapes and dtypes, in any tree.
    - `donate`: which of `args` the program may overwrite.

    **Returns:**

    The program and its kernels.
    """
    target = TARGETS[architecture]
    # There is no driver whose version could be checked.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target.config(), topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
    )
    # The mesh in scope says which GPU is lowered for.
    device = AbstractDevice(target.name, None, platform="gpu")
    mesh = AbstractMesh((1,), ("gpu",), abstract_device=device)
    with tempfile.TemporaryDirectory() as folder, jax.sharding.use_abstract_mesh(mesh):
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        traced = jax.jit(function, donate_argnums=donate).trace(*args)
        lowered = traced.lower(lowering_platforms=("cuda",))
        program = lowered.compile(compiler_options={"xla_dump_to": folder, **_OPTIONS})
        kernels = kernels_in(pathlib.Path(folder), _ptxas(), architecture)
    return Compiled(program, kernels)


def _ptxas() -> pathlib.Path:
    # The folder that all of NVIDIA's packages for CUDA 13 share.
    spec = importlib.util.find_spec("nvidia")
    found = spec.submodule_search_locations if spec else None
    return pathlib.Path(next(iter(found or ["nvidia"]))) / "cu13" / "bin" / "ptxas"
