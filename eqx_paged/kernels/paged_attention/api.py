"""Paged decode attention: the public function."""

from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from ..._types import Implementation, Scale
from .. import _arguments as arguments
from .._gpu import MosaicGPUConfig, TritonConfig
from .._mosaic_gpu import interpreter
from .._online_softmax import DEFAULT_MASK_VALUE
from .._over_pages import attend_over_pages, Config, Operation, PallasKernel
from .._tpu import TPUConfig
from .._triton import not_here, unsupported
from . import pallas_mosaic_gpu, pallas_tpu, pallas_triton, reference, tpu_plan, xla


_OPERATION = Operation(
    "paged_attention",
    reference.paged_attention,
    xla.paged_attention,
    PallasKernel(TPUConfig, pallas_tpu.paged_attention, tpu_plan.unsupported),
    (
        PallasKernel(TritonConfig, pallas_triton.paged_attention, unsupported, not_here),
        PallasKernel(
            MosaicGPUConfig,
            pallas_mosaic_gpu.paged_attention,
            pallas_mosaic_gpu.unsupported,
            interpreter=interpreter,
        ),
    ),
)


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
    config: Config | None = None,
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
    - `implementation`: `"xla"`; `"pallas_tpu"` or `"pallas_gpu"`, which have no gradient;
        or None to let the platform decide.
    - `interpret`: runs the Pallas kernel that `implementation` names on a CPU, slowly:
        True, or for the TPU's `pltpu.InterpretParams`, which can look for races.
    - `config`: how a Pallas kernel divides its work, a [`eqx_paged.TPUConfig`][] or
        [`eqx_paged.TritonConfig`][]; None chooses. On a GPU, a
        [`eqx_paged.MosaicGPUConfig`][] runs the kernel for Hopper.

    **Returns:**

    The output, in q's dtype. With `return_residuals` also `m`, the largest logit, and `l`,
    the softmax denominator relative to it, both float32.

    **Raises:**

    `ValueError` for shapes, dtypes and options that do not fit together, and for the config
    of another kernel than the one that runs;
    `NotImplementedError`, when the program is lowered, for an implementation that cannot
    run.

    !!! info

        Paged attention is described in Kwon et al., "Efficient Memory Management for
        Large Language Model Serving with PagedAttention", 2023.
    """
    arguments.check_over_pages(q, k_pages, v_pages, kv_lens, page_indices)
    arguments.check_equal("num_seqs of q", q.shape[0], "of kv_lens", kv_lens.shape[0])
    return attend_over_pages(
        _OPERATION,
        dict(
            q=q,
            k_pages=k_pages,
            v_pages=v_pages,
            kv_lens=kv_lens,
            page_indices=page_indices,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        ),
        sm_scale=sm_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        mask_value=mask_value,
        return_residuals=return_residuals,
        implementation=implementation,
        interpret=interpret,
        config=config,
    )
