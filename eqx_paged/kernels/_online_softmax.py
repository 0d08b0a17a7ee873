"""Softmax over keys that arrive in parts: running max `m`, running sum `l`, accumulator.

The parts of one query are combined exactly, in any order. Everything is float32.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


# What `m` starts from, and is for a query without keys: finite, so that `m - m` is 0 and
# not NaN, and far enough from the end of float32 that subtracting a logit cannot overflow.
DEFAULT_MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)


def partial_softmax(
    logits: Float[Array, "*queries keys"],
    keep: Bool[Array, "*#queries keys"],
) -> tuple[
    Float[Array, "*queries keys"], Float[Array, "*queries"], Float[Array, "*queries"]
]:
    """Unnormalised probabilities of one part, with their max and sum.

    A key that is not kept has probability 0 whatever its logit, NaN included.
    """
    logits = jnp.where(keep, logits, DEFAULT_MASK_VALUE)
    m = jnp.maximum(jnp.max(logits, axis=-1), DEFAULT_MASK_VALUE)
    p = jnp.where(keep, jnp.exp(logits - m[..., None]), 0.0)
    return p, m, jnp.sum(p, axis=-1)


Partial = tuple[
    Float[Array, "*queries"], Float[Array, "*queries"], Float[Array, "*queries head_dim"]
]


def accumulate(so_far: Partial, part: Partial) -> Partial:
    """Adds a part's max, sum and unnormalised output to those of all parts before it."""
    m, l, acc = so_far
    part_m, part_l, part_acc = part
    new_m = jnp.maximum(m, part_m)
    old, new = jnp.exp(m - new_m), jnp.exp(part_m - new_m)
    acc = acc * old[..., None] + part_acc * new[..., None]
    return new_m, l * old + part_l * new, acc


def normalise(
    acc: Float[Array, "*queries head_dim"],
    m: Float[Array, "*queries"],
    l: Float[Array, "*queries"],
    sinks: Float[Array, "*#queries"] | None = None,
) -> Float[Array, "*queries head_dim"]:
    """The attention output. A query without keys gives 0, with or without sinks."""
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)
        top = jnp.maximum(m, sinks)
        acc = acc * jnp.exp(m - top)[..., None]
        l = jnp.where(l > 0, l * jnp.exp(m - top) + jnp.exp(sinks - top), 0.0)
    return acc / jnp.where(l > 0, l, 1.0)[..., None]


def merge_residuals(
    outs: Float[Array, "parts *queries head_dim"]
    | Sequence[Float[Array, "*queries head_dim"]],
    ms: Float[Array, "parts *queries"] | Sequence[Float[Array, "*queries"]],
    ls: Float[Array, "parts *queries"] | Sequence[Float[Array, "*queries"]],
) -> tuple[
    Float[Array, "*queries head_dim"],
    Float[Array, "*queries"],
    Float[Array, "*queries"],
]:
    """Combines attention over disjoint sets of keys into attention over their union.

    The result is exact, whatever the sets and their order: use it where the keys of a
    query live in several caches, or were split to work on them in parallel.

    **Arguments:**

    - `outs`: the normalised output of each part.
    - `ms`: the largest logit of each part.
    - `ls`: the softmax denominator of each part, relative to its `m`.

    Each is one array with the parts on its first axis, or a sequence of one array a part,
    as returned by an attention function with `return_residuals=True`.

    **Returns:**

    `(out, m, l)` of the union, in the same form, so that it can be merged again. `out` has
    the dtype of `outs`; `m` and `l` are float32.

    **Raises:**

    `ValueError` for parts of different number or shape.
    """
    for name, parts in (("outs", outs), ("ms", ms), ("ls", ls)):
        shapes = {jnp.shape(part) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"{name} must have one shape, but have {sorted(shapes)}.")
    counts = {len(outs), len(ms), len(ls)}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            "outs, ms and ls must have one entry a part, but have "
            f"{len(outs)}, {len(ms)} and {len(ls)}."
        )
    outs, ms, ls = (jnp.stack(parts) for parts in (outs, ms, ls))
    if not outs.shape[:-1] == ms.shape == ls.shape:
        raise ValueError(
            "outs, ms and ls must have the same queries, but their shapes are "
            f"{outs.shape}, {ms.shape} and {ls.shape}."
        )
    ms, ls = ms.astype(jnp.float32), ls.astype(jnp.float32)
    # A part without keys says nothing of the largest logit, unless none has any.
    m = jnp.max(jnp.where(ls > 0, ms, DEFAULT_MASK_VALUE), axis=0)
    weights = ls * jnp.exp(jnp.where(ls > 0, ms - m[None], 0.0))
    l = jnp.sum(weights, axis=0)
    m = jnp.where(l > 0, m, jnp.max(ms, axis=0))
    acc = jnp.sum(outs.astype(jnp.float32) * weights[..., None], axis=0)
    return normalise(acc, m, l).astype(outs.dtype), m, l
