"""Gradients of loops that JAX cannot differentiate: those of the definition."""

import jax

from .._types import Implementation
from ._choose import Kernel, PLATFORMS


def differentiable(
    op: str, implementation: Implementation | None, kernel: Kernel, definition: Kernel
) -> Kernel:
    """`kernel`, differentiated in reverse as if it were `definition`; a Pallas kernel that
    was asked for by name says that it cannot be."""
    if implementation not in PLATFORMS:
        return with_gradient_of(definition, kernel)

    @jax.custom_vjp
    def without_gradient(operands):
        return kernel(operands)

    def refuse(operands):
        raise NotImplementedError(
            f"{op} has no gradient as {implementation!r}; it has one as 'xla' and None."
        )

    without_gradient.defvjp(refuse, refuse)
    return without_gradient


def with_gradient_of(definition: Kernel, kernel: Kernel) -> Kernel:
    """`kernel`, differentiated in reverse as if it were `definition`.

    The fast loops end after as many turns as the data need, which has no reverse mode.
    The definition computes the same function from plain array operations; its gradient
    takes memory in proportion to queries x context.
    """

    @jax.custom_vjp
    def differentiable(operands):
        return kernel(operands)

    def forward(operands):
        return kernel(operands), operands

    def backward(operands, cotangents):
        _, pullback = jax.vjp(definition, operands)
        return pullback(cotangents)

    differentiable.defvjp(forward, backward)
    return differentiable
