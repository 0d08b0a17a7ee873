"""How the attentions over pages, decode and mixed, run one of their implementations."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._types import Implementation
from . import _arguments as arguments
from ._choose import attention_results, check_implementation, choose
from ._gpu import TritonConfig
from ._gradient import differentiable
from ._tpu import TPUConfig


Config = TPUConfig | TritonConfig


class PallasKernel(NamedTuple):
    config: type  # of what says how it divides its work
    run: Callable[..., Any]
    unsupported: Callable[..., str | None]  # of q, k_pages, v_pages, page_indices
    # Why it cannot be lowered where it is not interpreted.
    not_here: Callable[[], str | None] = lambda: None

    def reason_against(self, *arrays: Any, interpret: Any) -> str | None:
        return self.unsupported(*arrays) or (None if interpret else self.not_here())


class Operation(NamedTuple):
    """The implementations of one array function, which take the same operands."""

    name: str
    reference: Callable[..., Any]
    xla: Callable[..., Any]
    pallas_tpu: PallasKernel
    pallas_gpu: tuple[PallasKernel, ...]  # the first runs where no config is given

    def pallas(self, config: Config | None) -> dict[str, PallasKernel]:
        """The kernel of each implementation that a config, or none, is for."""
        by_config = {kernel.config: kernel for kernel in self.pallas_gpu}
        on_gpu = by_config.get(type(config), self.pallas_gpu[0])
        return {"pallas_tpu": self.pallas_tpu, "pallas_gpu": on_gpu}


def attend_over_pages(
    operation: Operation,
    operands: dict[str, Any],
    *,
    sm_scale: float | None,
    soft_cap: float | None,
    sliding_window: int | None,
    mask_value: float,
    return_residuals: bool,
    implementation: Implementation | None,
    interpret: Any,
    config: Config | None,
) -> Any:  # the output; with residuals also m and l
    """Checks the options, fills in what they leave open, and runs one implementation."""
    _, num_heads, head_dim = operands["q"].shape
    arguments.check_options(
        num_heads=num_heads,
        sm_scale=sm_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        sinks=operands["sinks"],
        mask_value=mask_value,
        return_residuals=return_residuals,
    )
    check_implementation(implementation, interpret)
    pallas = operation.pallas(config)
    if implementation in pallas:
        _check_config(implementation, pallas[implementation], config)
    num_kv_heads = operands["k_pages"].shape[1]
    results = _traced_once(
        operands
        | {
            name: arguments.scale_per_head(name, operands[name], num_kv_heads)
            for name in ("k_scale", "v_scale")
        },
        operation=operation,
        sm_scale=arguments.sm_scale_or_default(sm_scale, head_dim),
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        mask_value=mask_value,
        return_residuals=return_residuals,
        implementation=implementation,
        interpret=interpret,
        config=config,
    )
    return results if return_residuals else results[0]


def _check_config(name, kernel, config):
    if config is not None and not isinstance(config, kernel.config):
        raise ValueError(
            f"{name!r} runs, whose config is a {kernel.config.__name__}, but config is "
            f"{config!r}."
        )


# Behind one `jit`, so that a model of equal layers traces it once.
@functools.partial(
    jax.jit,
    static_argnames=(
        "operation",
        "sm_scale",
        "soft_cap",
        "sliding_window",
        "mask_value",
        "return_residuals",
        "implementation",
        "interpret",
        "config",
    ),
)
def _traced_once(
    operands,
    *,
    operation,
    mask_value,
    return_residuals,
    implementation,
    interpret,
    config,
    **options,
):
    num_results = 3 if return_residuals else 1
    arrays = [operands[name] for name in ("q", "k_pages", "v_pages", "page_indices")]
    for_pallas = dict(return_residuals=return_residuals, interpret=interpret, config=config)
    pallas = operation.pallas(config)

    def by_pallas(name):
        def run(operands):
            _check_config(name, pallas[name], config)
            return pallas[name].run(**operands, **options, **for_pallas)

        return run

    kernel = choose(
        operation.name,
        implementation,
        {
            "xla": lambda operands: operation.xla(**operands, **options)[:num_results],
            **{name: by_pallas(name) for name in pallas},
        },
        results=attention_results(operands["q"], num_results),
        unsupported={
            name: kernel.reason_against(*arrays, interpret=interpret)
            for name, kernel in pallas.items()
        },
        interpret=interpret,
    )
    kernel = differentiable(
        operation.name,
        implementation,
        kernel,
        lambda operands: operation.reference(**operands, **options, return_residuals=True)[
            :num_results
        ],
    )
    out, *residuals = kernel(operands)
    if not residuals:
        return (out,)
    m, l = residuals
    return out, jnp.where(l == 0, mask_value, m), l
