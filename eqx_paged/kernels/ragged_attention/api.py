"""Ragged attention over contiguous keys and values: the public functions."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Real

from ..._types import Implementation, Scale
from .. import _arguments as arguments
from .._choose import attention_results, check_implementation, choose
from .._gradient import differentiable, with_gradient_of
from .._online_softmax import DEFAULT_MASK_VALUE
from .._tpu import TPUConfig
from . import pallas_tpu, reference, xla


def ragged_gqa(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    v: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    *,
    sm_scale: float | None = None,
    block_size: int = 256,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    implementation: Implementation | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    config: TPUConfig | None = None,
) -> tuple[
    Float[Array, "num_seqs num_heads head_dim"],
    Float[Array, "num_seqs num_heads"],
    Float[Array, "num_seqs num_heads"],
]:
    """Attention of one query a row to a window of the row's contiguous keys and values.

    Grouped-query attention: query heads `i * group` to `(i + 1) * group - 1` share kv head
    `i`. Differentiable in reverse mode, at the memory of the whole buffer.

    **Arguments:**

    - `q`: one query a row and head.
    - `k`, `v`: a buffer a row. uint16 is read as the bits of bfloat16.
    - `lengths`, `starts`: a row attends to positions `starts <= i < lengths` of its buffer;
        both count from the buffer's beginning. An empty window gives 0.
    - `block_size`: how many positions are read at a time, of many rows fewer where a CPU's
        caches would not hold them. Blocks outside every row's window are not read; on a
        TPU, none outside a row's own.
    - `implementation`: `"xla"`, `"pallas_tpu"`, or None to let the platform decide.
    - `interpret`: runs the Pallas kernel that `implementation` names on a CPU, slowly:
        True, or `pltpu.InterpretParams`, which can look for races.
    - `config`: how a Pallas kernel for the TPU divides its work; None chooses.
    - the other options: as in [`eqx_paged.paged_attention`][].

    **Returns:**

    `(out, m, l)`: the output, in q's dtype; the largest logit and the softmax denominator
    relative to it, both float32. Merge partial results with
    [`eqx_paged.merge_residuals`][]; not if they had sinks, which belong to the merged
    result and are not in `m` and `l`.

    **Raises:**

    As [`eqx_paged.paged_attention`][].
    """
    arguments.check_rank("q", q, 3)
    arguments.check_floating(q=q)
    arguments.check_rank("k", k, 4)
    arguments.check_rank("v", v, 4)
    arguments.check_stored(k=k, v=v)
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, but have {k.shape} and {v.shape}.")
    arguments.check_equal("num_seqs of q", q.shape[0], "of k", k.shape[0])
    arguments.check_equal("head_dim of q", q.shape[2], "of k", k.shape[3])
    arguments.check_heads(q.shape[1], k.shape[2])
    if 0 in (*q.shape, k.shape[1]):
        raise ValueError(
            "There must be at least one row, position and head_dim, but q is of shape "
            f"{q.shape} and k of shape {k.shape}."
        )
    for name, array in (("lengths", lengths), ("starts", starts)):
        arguments.check_rank(name, array, 1)
        arguments.check_equal("num_seqs of q", q.shape[0], f"of {name}", array.shape[0])
    arguments.check_indices(lengths=lengths, starts=starts)
    arguments.check_options(
        num_heads=q.shape[1],
        sm_scale=sm_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        sinks=sinks,
        mask_value=mask_value,
        return_residuals=False,
    )
    if type(block_size) is not int or block_size < 1:
        raise ValueError(f"block_size must be an int of at least 1, but is {block_size!r}.")
    check_implementation(implementation, interpret)
    operands = dict(
        q=q,
        k=k,
        v=v,
        lengths=lengths,
        starts=starts,
        sinks=sinks,
        k_scale=arguments.scale_per_head("k_scale", k_scale, k.shape[2]),
        v_scale=arguments.scale_per_head("v_scale", v_scale, k.shape[2]),
    )
    return _traced_once(
        operands,
        sm_scale=arguments.sm_scale_or_default(sm_scale, q.shape[2]),
        block_size=block_size,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        mask_value=mask_value,
        implementation=implementation,
        interpret=interpret,
        config=config,
    )


def ragged_mha(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k: Real[Array, "num_seqs max_len num_heads head_dim"],
    v: Real[Array, "num_seqs max_len num_heads head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    *,
    sm_scale: float | None = None,
    block_size: int = 256,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    implementation: Implementation | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    config: TPUConfig | None = None,
) -> tuple[
    Float[Array, "num_seqs num_heads head_dim"],
    Float[Array, "num_seqs num_heads"],
    Float[Array, "num_seqs num_heads"],
]:
    """[`eqx_paged.ragged_gqa`][] with a kv head for each head: multi-head attention.

    **Arguments:**

    As [`eqx_paged.ragged_gqa`][], options included.

    **Returns:**

    `(out, m, l)`, as [`eqx_paged.ragged_gqa`][].

    **Raises:**

    As [`eqx_paged.ragged_gqa`][].
    """
    arguments.check_rank("q", q, 3)
    arguments.check_floating(q=q)
    arguments.check_rank("k", k, 4)
    arguments.check_equal("num_heads of q", q.shape[1], "num_heads of k", k.shape[2])
    return ragged_gqa(
        q,
        k,
        v,
        lengths,
        starts,
        sm_scale=sm_scale,
        block_size=block_size,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        mask_value=mask_value,
        implementation=implementation,
        interpret=interpret,
        config=config,
    )


def ragged_mqa(
    q: Float[Array, "num_seqs num_heads head_dim"],
    k: Real[Array, "num_seqs max_len head_dim"],
    v: Real[Array, "num_seqs max_len head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    *,
    sm_scale: float | None = None,
    block_size: int = 256,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    implementation: Implementation | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    config: TPUConfig | None = None,
) -> tuple[
    Float[Array, "num_seqs num_heads head_dim"],
    Float[Array, "num_seqs num_heads"],
    Float[Array, "num_seqs num_heads"],
]:
    """[`eqx_paged.ragged_gqa`][] with one kv head for all: multi-query attention.

    **Arguments:**

    As [`eqx_paged.ragged_gqa`][], options included, but that `k` and `v` have no axis for
    heads.

    **Returns:**

    `(out, m, l)`, as [`eqx_paged.ragged_gqa`][].

    **Raises:**

    As [`eqx_paged.ragged_gqa`][].
    """
    arguments.check_rank("k", k, 3)
    arguments.check_rank("v", v, 3)
    return ragged_gqa(
        q,
        k[:, :, None],
        v[:, :, None],
        lengths,
        starts,
        sm_scale=sm_scale,
        block_size=block_size,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        mask_value=mask_value,
        implementation=implementation,
        interpret=interpret,
        config=config,
    )


# Behind one `jit`, so that a model of equal layers traces it once.
@functools.partial(
    jax.jit,
    static_argnames=(
        "sm_scale",
        "block_size",
        "soft_cap",
        "sliding_window",
        "mask_value",
        "implementation",
        "interpret",
        "config",
    ),
)
def _traced_once(
    operands, *, mask_value, implementation, interpret, config, block_size, **options
):
    kernel = choose(
        "ragged_gqa",
        implementation,
        {
            "xla": lambda operands: xla.ragged_gqa(
                **operands, **options, block_size=block_size
            ),
            "pallas_tpu": lambda operands: pallas_tpu.ragged_gqa(
                **operands,
                **options,
                block_size=block_size,
                interpret=interpret,
                config=config,
            ),
        },
        results=attention_results(operands["q"]),
        unsupported={
            "pallas_tpu": pallas_tpu.unsupported(*(operands[name] for name in "kv"))
        },
        interpret=interpret,
    )
    kernel = differentiable(
        "ragged_gqa",
        implementation,
        kernel,
        lambda operands: reference.ragged_gqa(**operands, **options),
    )
    out, m, l = kernel(operands)
    return out, jnp.where(l == 0, mask_value, m), l


def ragged_chunk_attention(
    q: Float[Array, "num_tokens num_heads head_dim"],
    k: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    v: Real[Array, "num_seqs max_len num_kv_heads head_dim"],
    lengths: Int32[Array, " num_seqs"],
    starts: Int32[Array, " num_seqs"],
    cu_q_lens: Int32[Array, " num_seqs_plus_one"],
    num_seqs: Int32[Array, ""],
    *,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "num_tokens num_heads head_dim"]:
    """`ragged_gqa` for packed rows of queries, as in `ragged_paged_attention`: what
    `RaggedAttention` needs of a mixed step."""
    arguments.check_rank("q", q, 3)
    arguments.check_floating(q=q)
    arguments.check_heads(q.shape[1], k.shape[2])
    arguments.check_equal("head_dim of q", q.shape[2], "of the cache", k.shape[3])
    arguments.check_options(
        num_heads=q.shape[1],
        sm_scale=sm_scale,
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        sinks=sinks,
        mask_value=DEFAULT_MASK_VALUE,
        return_residuals=False,
    )
    check_implementation(implementation)
    operands = dict(
        q=q,
        k=k,
        v=v,
        lengths=lengths,
        starts=starts,
        cu_q_lens=cu_q_lens,
        num_seqs=num_seqs,
        sinks=sinks,
    )
    return _chunk_traced_once(
        operands,
        sm_scale=arguments.sm_scale_or_default(sm_scale, q.shape[2]),
        soft_cap=soft_cap,
        sliding_window=sliding_window,
        implementation=implementation,
    )


@functools.partial(
    jax.jit,
    static_argnames=("sm_scale", "soft_cap", "sliding_window", "implementation"),
)
def _chunk_traced_once(operands, *, implementation, **options):
    options |= dict(k_scale=None, v_scale=None)
    kernel = choose(
        "ragged_gqa with several queries a row",
        implementation,
        {"xla": lambda operands: xla.ragged_chunk_attention(**operands, **options)},
        results=attention_results(operands["q"]),
    )
    kernel = with_gradient_of(
        lambda operands: reference.ragged_chunk_attention(**operands, **options), kernel
    )
    return kernel(operands)[0]
