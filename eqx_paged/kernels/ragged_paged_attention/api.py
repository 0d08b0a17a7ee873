"""Ragged paged attention: the public function."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from ..._types import Implementation, Scale
from .. import _arguments as arguments
from .._choose import attention_results, check_implementation, choose
from .._gradient import differentiable
from .._online_softmax import DEFAULT_MASK_VALUE
from .._tpu import TPUConfig
from ..paged_attention.api import check_arguments
from . import pallas_tpu, reference, xla


def ragged_paged_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    kv_lens: Int32[Array, " num_seqs"],
    page_indices: Int32[Array, "num_seqs pages_per_seq"],
    cu_q_lens: Int32[Array, " num_seqs_plus_one"],
    num_seqs: Int32[Array, ""],
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    return_residuals: bool = False,
    implementation: Implementation | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    config: TPUConfig | None = None,
) -> (
    Float[Array, "num_tokens num_heads head_dim"]
    | tuple[
        Float[Array, "num_tokens num_heads head_dim"],
        Float[Array, "num_tokens num_heads"],
        Float[Array, "num_tokens num_heads"],
    ]
):
    """Causal attention of packed rows of queries to keys and values in pages.

    Any mix of decode (one query), prefill (as many queries as keys) and chunked prefill
    (something between). The last query of a row is its last token: query `j` of a row sits
    at position `kv_len - q_len + j` and sees the positions up to its own.

    **Arguments:**

    - `q`: the queries of all rows, row after row.
    - `k_pages`, `v_pages`, `page_indices`: as in [`eqx_paged.paged_attention`][]. The
        queries' own keys and values must have been written.
    - `kv_lens`: how many tokens each row holds, its queries' own included.
    - `cu_q_lens`: where each row's queries begin, and at the end their number: row `i` has
        queries `cu_q_lens[i]` to `cu_q_lens[i + 1] - 1`.
    - `num_seqs`: rows from this one on are ignored.
    - the options: as in [`eqx_paged.paged_attention`][]. `sliding_window` counts back from
        each query's own position.

    **Returns:**

    As [`eqx_paged.paged_attention`][], one entry a query. Queries that belong to no row,
    past the last one's end, give 0.

    **Raises:**

    As [`eqx_paged.paged_attention`][].

    !!! warning

        Queries of a row are worked on together, so a NaN or an infinity among the values
        of tokens that were written may reach the outputs of neighbouring queries of the
        same row that do not see it. What was not written never does.
    """
    check_arguments(q, k_pages, v_pages, kv_lens, page_indices)
    arguments.check_rank("cu_q_lens", cu_q_lens, 1)
    arguments.check_rank("num_seqs", num_seqs, 0)
    arguments.check_indices(cu_q_lens=cu_q_lens, num_seqs=num_seqs)
    arguments.check_equal(
        "the length of cu_q_lens",
        cu_q_lens.shape[0],
        "the length of kv_lens plus one",
        kv_lens.shape[0] + 1,
    )
    arguments.check_options(
        num_heads=q.shape[1],
        sm_scale=sm_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        sinks=sinks,
        mask_value=mask_value,
        return_residuals=return_residuals,
    )
    check_implementation(implementation, interpret)
    operands = dict(
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        kv_lens=kv_lens,
        page_indices=page_indices,
        cu_q_lens=cu_q_lens,
        num_seqs=num_seqs,
        sinks=sinks,
        k_scale=arguments.scale_per_head("k_scale", k_scale, k_pages.shape[1]),
        v_scale=arguments.scale_per_head("v_scale", v_scale, k_pages.shape[1]),
    )
    results = _traced_once(
        operands,
        sm_scale=arguments.sm_scale_or_default(sm_scale, q.shape[2]),
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        mask_value=mask_value,
        return_residuals=return_residuals,
        implementation=implementation,
        interpret=interpret,
        config=config,
    )
    return results if return_residuals else results[0]


# Behind one `jit`, so that a model of equal layers traces it once.
@functools.partial(
    jax.jit,
    static_argnames=(
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
    operands, *, mask_value, return_residuals, implementation, interpret, config, **options
):
    num_results = 3 if return_residuals else 1
    arrays = (operands[name] for name in ("q", "k_pages", "v_pages", "page_indices"))
    kernel = choose(
        "ragged_paged_attention",
        implementation,
        {
            "xla": lambda operands: xla.ragged_paged_attention(**operands, **options)[
                :num_results
            ],
            "pallas_tpu": lambda operands: pallas_tpu.ragged_paged_attention(
                **operands,
                **options,
                return_residuals=return_residuals,
                interpret=interpret,
                config=config,
            ),
        },
        results=attention_results(operands["q"], num_results),
        unsupported={"pallas_tpu": pallas_tpu.unsupported(*arrays)},
        interpret=interpret,
    )
    kernel = differentiable(
        "ragged_paged_attention",
        implementation,
        kernel,
        lambda operands: reference.ragged_paged_attention(
            **operands, **options, return_residuals=True
        )[:num_results],
    )
    out, *residuals = kernel(operands)
    if not residuals:
        return (out,)
    m, l = residuals
    return out, jnp.where(l == 0, mask_value, m), l
