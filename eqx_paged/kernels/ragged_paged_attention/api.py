"""Ragged paged attention: the public function."""

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
    "ragged_paged_attention",
    reference.ragged_paged_attention,
    xla.ragged_paged_attention,
    PallasKernel(TPUConfig, pallas_tpu.ragged_paged_attention, tpu_plan.unsupported),
    (
        PallasKernel(
            TritonConfig, pallas_triton.ragged_paged_attention, unsupported, not_here
        ),
        PallasKernel(
            MosaicGPUConfig,
            pallas_mosaic_gpu.ragged_paged_attention,
            pallas_mosaic_gpu.unsupported,
            interpreter=interpreter,
        ),
    ),
)


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
    config: Config | None = None,
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
    arguments.check_over_pages(q, k_pages, v_pages, kv_lens, page_indices)
    arguments.check_rank("cu_q_lens", cu_q_lens, 1)
    arguments.check_rank("num_seqs", num_seqs, 0)
    arguments.check_indices(cu_q_lens=cu_q_lens, num_seqs=num_seqs)
    arguments.check_equal(
        "the length of cu_q_lens",
        cu_q_lens.shape[0],
        "the length of kv_lens plus one",
        kv_lens.shape[0] + 1,
    )
    return attend_over_pages(
        _OPERATION,
        dict(
            q=q,
            k_pages=k_pages,
            v_pages=v_pages,
            kv_lens=kv_lens,
            page_indices=page_indices,
            cu_q_lens=cu_q_lens,
            num_seqs=num_seqs,
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
