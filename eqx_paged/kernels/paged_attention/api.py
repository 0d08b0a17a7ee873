"""Paged decode attention: the public function."""

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
from . import pallas_tpu, reference, xla


def paged_attention(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    v_pages: Real[Array, "num_pages num_kv_heads rows lanes"],
    kv_lens: Int32[Array, " num_seqs"],
    page_indices: Int32[Array, "num_seqs pages_per_seq"],
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
    Float[Array, "num_seqs num_heads head_dim"]
    | tuple[
        Float[Array, "num_seqs num_heads head_dim"],
        Float[Array, "num_seqs num_heads"],
        Float[Array, "num_seqs num_heads"],
    ]
):
    """Attention of one query a row to the row's keys and values, which lie in pages.

    This is a decode step. The time goes with the sum of `kv_lens`, not with the size of
    the table. Differentiable in `q`, `k_pages`, `v_pages`, `sinks` and the scales (reverse
    mode; the gradient gathers the whole table, so it takes memory as a dense cache does),
    but not through pages stored as uint16.

    **Arguments:**

    - `q`: one query a row and head.
    - `k_pages`, `v_pages`: the stored keys and values, `[num_pages, num_kv_heads,
        page_size, head_dim]`; or, where `head_dim` divides 128, the same numbers in rows
        of 128, `[num_pages, num_kv_heads, page_size * head_dim / 128, 128]`; or with
        `head_dim` rounded up to a multiple of 128, the rest zeros. uint16 is read as the
        bits of bfloat16, int8 as numbers to be scaled. `num_heads` must be a
        multiple of `num_kv_heads`; query heads `i * group` to `(i + 1) * group - 1` share
        kv head `i`.
    - `kv_lens`: how many tokens each row holds, the query's own included. A row of length
        0 gives 0.
    - `page_indices`: the pages of each row in order. Entries past a row's length are never
        followed.
    - `sm_scale`: the factor on `q . k`; `head_dim ** -0.5` if None.
    - `soft_cap`: if given, logits become `soft_cap * tanh(logits / soft_cap)`.
    - `sliding_window`: if given, only the last that many tokens are seen. Pages wholly
        outside are not read.
    - `sinks`: if given, a logit a head that joins the denominator only.
    - `k_scale`, `v_scale`: factors that make the stored numbers keys and values: a scalar
        or one a kv head.
    - `mask_value`: what the residuals tell as the largest logit of a row without keys.
    - `return_residuals`: whether to return `(out, m, l)`, for
        [`eqx_paged.merge_residuals`][]. Not together with `sinks`.
    - `implementation`: `"xla"`; `"pallas_tpu"`, which has no gradient; or None to let the
        platform decide.
    - `interpret`: runs the Pallas kernel that `implementation` names on a CPU, slowly:
        True, or `pltpu.InterpretParams`, which can look for races.
    - `config`: how a Pallas kernel for the TPU divides its work; None chooses.

    **Returns:**

    The output, in q's dtype. With `return_residuals` also `m`, the largest logit, and `l`,
    the softmax denominator relative to it, both float32.

    **Raises:**

    `ValueError` for shapes, dtypes and options that do not fit together;
    `NotImplementedError`, when the program is lowered, for an implementation that cannot
    run.

    !!! info

        Paged attention is described in Kwon et al., "Efficient Memory Management for
        Large Language Model Serving with PagedAttention", 2023.
    """
    check_arguments(q, k_pages, v_pages, kv_lens, page_indices)
    arguments.check_equal("num_seqs of q", q.shape[0], "of kv_lens", kv_lens.shape[0])
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


def check_arguments(
    q: Array, k_pages: Array, v_pages: Array, kv_lens: Array, page_indices: Array
) -> None:
    """What holds for every attention over pages."""
    arguments.check_rank("q", q, 3)
    arguments.check_floating(q=q)
    arguments.check_pages(k_pages, v_pages, q.shape[2])
    arguments.check_heads(q.shape[1], k_pages.shape[1])
    arguments.check_rank("kv_lens", kv_lens, 1)
    arguments.check_rank("page_indices", page_indices, 2)
    arguments.check_indices(kv_lens=kv_lens, page_indices=page_indices)
    arguments.check_equal(
        "num_seqs of kv_lens",
        kv_lens.shape[0],
        "of page_indices",
        page_indices.shape[0],
    )
    if page_indices.size == 0 or q.shape[0] == 0:
        raise ValueError(
            "There must be at least one row, one page a row and one query, but q is of "
            f"shape {q.shape} and page_indices of shape {page_indices.shape}."
        )


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
        "paged_attention",
        implementation,
        {
            "xla": lambda operands: xla.paged_attention(**operands, **options)[
                :num_results
            ],
            "pallas_tpu": lambda operands: pallas_tpu.paged_attention(
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
        "paged_attention",
        implementation,
        kernel,
        lambda operands: reference.paged_attention(
            **operands, **options, return_residuals=True
        )[:num_results],
    )
    out, *residuals = kernel(operands)
    if not residuals:
        return (out,)
    m, l = residuals
    return out, jnp.where(l == 0, mask_value, m), l
