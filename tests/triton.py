"""Triton kernels without a GPU, lowered for one that is named."""

import contextlib
import warnings

import jax
import pytest
from jax._src.pallas.triton import lowering
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


@contextlib.contextmanager
def lowered_for(kind):
    """Programs are lowered for a GPU of that kind. JAX warns that it will drop Triton."""
    try:
        device = AbstractDevice(kind, None, platform="gpu")
    except TypeError:  # before jax 0.11
        device = AbstractDevice(kind, None)
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton", DeprecationWarning)
        yield


def lower(function, *args, platform="cuda"):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def triton_programs(function, *args):
    """The programs of the kernels of a call, in Triton's own language."""
    found = []
    to_triton = lowering.lower_jaxpr_to_triton_module

    def told(*args, **kwargs):
        result = to_triton(*args, **kwargs)
        found.append(result.module.operation.get_asm())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "lower_jaxpr_to_triton_module", told)
        lower(function, *args)
    return found


def shapes_of(*args):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
