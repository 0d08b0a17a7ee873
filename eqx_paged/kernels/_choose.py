"""The one place that picks an implementation."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.core
from jax.extend.core import Primitive
from jax.interpreters import mlir

from .._types import Implementation


# Takes the arrays of a call as one mapping, and gives a tuple of arrays.
Kernel = Callable[[dict[str, Any]], Any]


def check_implementation(implementation: str | None) -> None:
    known = get_args(Implementation)
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"implementation must be None or one of {known}, but is {implementation!r}."
        )


def choose(
    op: str, implementation: Implementation | None, kernels: Mapping[str, Kernel]
) -> Kernel:
    """The kernel that runs. Without a wish that is "xla", which every platform has.

    A kernel that there is not is refused when the program is lowered and not while it is
    traced, so that a program can be traced here and compiled for another platform.
    """
    name = implementation or "xla"
    if name in kernels:
        return kernels[name]
    has = ", ".join(repr(kernel) for kernel in kernels)
    reason = f"{op} has no implementation {name!r}; it has {has}."
    return lambda operands: _refuse(reason, jax.eval_shape(kernels["xla"], operands))


def _refuse(reason, results):
    avals = tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in results)
    return tuple(_refuse_p.bind(reason=reason, results=avals))


def _lower_refusal(ctx, *, reason, results):
    raise NotImplementedError(reason)


# A primitive, since nothing else of JAX runs code of ours when a program is lowered. It is
# defined once, here, and only this file knows of it.
_refuse_p = Primitive("eqx_paged_refuse")
_refuse_p.multiple_results = True
_refuse_p.def_abstract_eval(lambda *, reason, results: list(results))
mlir.register_lowering(_refuse_p, _lower_refusal)
