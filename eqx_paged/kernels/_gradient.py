"""Gradients of loops that JAX cannot differentiate: those of the definition."""

import jax

from ._choose import Kernel


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
