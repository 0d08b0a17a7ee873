"""How the attentions over pages, decode and mixed, run one of their implementations."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._types import Implementation
from . import _arguments as arguments
from ._choose import attention_results, check_implementation, choose
from ._gpu import MosaicGPUConfig, TritonConfig
from ._gradient import differentiable
from ._pages import page_size_of
from ._tpu import TPUConfig


Config = TPUConfig | TritonConfig | MosaicGPUConfig


class PallasKernel(NamedTuple):
    config: type  # of what says how it divides its work
    run: Callable[..., Any]
    unsupported: Callable[..., str | None]  # of q, k_pages, v_pages, page_indices
    # Why it cannot be lowered where it is not interpreted.
    not_here: Callable[[], str | None] = lambda: None
    # What `interpret=True` stands for, if not the interpreter of all platforms.
    interpreter: Callable[[], Any] = lambda: True

    def reason_against(self, *arrays: Any, by_name: bool) -> str | None:
        return self.unsupported(*arrays) or (None if by_name else self.not_here())


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
    _check_config(operation, implementation, config)
    num_kv_heads = operands["k_pages"].shape[1]
    if sliding_window is not None:  # none sees more, and no sum with it overflows
        sliding_window = min(sliding_window, _capacity(operands, head_dim))
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


def _capacity(operands, head_dim):
    """Tokens that a row has places for."""
    pages_per_seq = operands["page_indices"].shape[1]
    return pages_per_seq * page_size_of(operands["k_pages"], head_dim)


def _check_config(operation, implementation, config):
    """Whether a config is one of the implementation's, or of any where that is open."""
    types: dict[str | None, tuple[type, ...]] = {
        "xla": (),
        "pallas_tpu": (operation.pallas_tpu.config,),
        "pallas_gpu": tuple(kernel.config for kernel in operation.pallas_gpu),
    }
    types[None] = types["pallas_tpu"] + types["pallas_gpu"]
    known = types[implementation]
    if config is not None and not isinstance(config, known):
        names = " or a ".join(config_type.__name__ for config_type in known)
        takes = f"whose config is a {names}" if names else "which takes no config"
        raise ValueError(f"{implementation!r} runs, {takes}, but config is {config!r}.")


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
    pallas = operation.pallas(config)
    # What there should not be: more tokens than the table has places for, or fewer than 0.
    capacity = min(_capacity(operands, operands["q"].shape[2]), jnp.iinfo(jnp.int32).max)
    operands = operands | dict(kv_lens=jnp.clip(operands["kv_lens"], 0, capacity))
    unsupported = {
        name: kernel.reason_against(*arrays, by_name=name == implementation)
        for name, kernel in pallas.items()
    }
    if interpret is True and unsupported.get(implementation) is None:
        interpret = pallas[implementation].interpreter()
    for_pallas = dict(return_residuals=return_residuals, interpret=interpret, config=config)

    def by_pallas(name):
        def run(operands):
            _check_config(operation, name, config)
            if not interpret and (why := pallas[name].not_here()) is not None:
                raise NotImplementedError(f"{operation.name} cannot run as {name!r}: {why}")
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
        unsupported=unsupported,
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
