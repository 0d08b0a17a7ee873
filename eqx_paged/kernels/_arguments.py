"""What every public array function checks and fills in before any work."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import Scale
from ._pages import LANES


def check_equal(name_a: str, a: int, name_b: str, b: int) -> None:
    if a != b:
        raise ValueError(f"{name_a} is {a} but {name_b} is {b}; they must be equal.")


def check_array(name: str, array: object) -> None:
    if not hasattr(array, "dtype"):
        raise ValueError(f"{name} must be an array, but is {array!r}.")


def check_rank(name: str, array: Any, rank: int) -> None:
    check_array(name, array)
    if array.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes, but its shape is {array.shape}.")


def check_indices(**arrays: Array) -> None:
    for name, array in arrays.items():
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32, but is {array.dtype}.")


def check_floating(**arrays: Array) -> None:
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating-point, but is {array.dtype}.")


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads != 0:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, and neither 0, but they are "
            f"{num_heads} and {num_kv_heads}."
        )


def check_pages(k_pages: Array, v_pages: Array, head_dim: int) -> None:
    check_rank("k_pages", k_pages, 4)
    check_rank("v_pages", v_pages, 4)
    if k_pages.shape != v_pages.shape:
        raise ValueError(
            f"k_pages and v_pages must have one shape, but have {k_pages.shape} and "
            f"{v_pages.shape}."
        )
    num_pages, _, rows, _ = k_pages.shape
    for name, size in (("head_dim", head_dim), ("num_pages", num_pages), ("rows", rows)):
        if size == 0:
            raise ValueError(f"{name} must be at least 1, but is 0.")
    check_stored(k_pages=k_pages, v_pages=v_pages)
    lanes = k_pages.shape[3]
    in_rows = lanes == LANES and LANES % head_dim == 0
    padded = lanes == -(-head_dim // LANES) * LANES
    if lanes != head_dim and not in_rows and not padded:
        raise ValueError(
            f"The last axis of k_pages is {lanes} but head_dim is {head_dim}. It must be "
            f"head_dim, or head_dim rounded up to a multiple of {LANES}."
        )


def check_stored(**arrays: Array) -> None:
    for name, array in arrays.items():
        known = array.dtype in (jnp.uint16, jnp.int8)
        if not known and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating-point, int8, or uint16 for the bits of bfloat16, "
                f"but is {array.dtype}."
            )


def check_writable(**pages: Array) -> None:
    for name, array in pages.items():
        if array.dtype != jnp.uint16 and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating-point, or uint16 for the bits of bfloat16, but "
                f"is {array.dtype}."
            )


def check_over_pages(
    q: Array, k_pages: Array, v_pages: Array, kv_lens: Array, page_indices: Array
) -> None:
    """What holds for every attention over pages."""
    check_rank("q", q, 3)
    check_floating(q=q)
    check_pages(k_pages, v_pages, q.shape[2])
    check_heads(q.shape[1], k_pages.shape[1])
    check_rank("kv_lens", kv_lens, 1)
    check_rank("page_indices", page_indices, 2)
    check_indices(kv_lens=kv_lens, page_indices=page_indices)
    check_equal(
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


def check_options(
    *,
    num_heads: int,
    sm_scale: float | None,
    soft_cap: float | None,
    sliding_window: int | None,
    sinks: Array | None,
    mask_value: float,
    return_residuals: bool,
) -> None:
    for name, number in (("sm_scale", sm_scale), ("soft_cap", soft_cap)):
        if number is not None and not isinstance(number, (int, float)):
            raise ValueError(f"{name} must be a Python number, but is {number!r}.")
    if sm_scale is not None and not math.isfinite(sm_scale):
        raise ValueError(f"sm_scale must be finite, but is {sm_scale}.")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be above 0 and finite, but is {soft_cap}.")
    # Not `isinstance`, which would take True for a window of one token.
    if sliding_window is not None and (
        type(sliding_window) is not int or not 1 <= sliding_window < 2**31
    ):
        raise ValueError(
            f"sliding_window must be an int from 1 to {2**31 - 1}, but is "
            f"{sliding_window!r}."
        )
    if not float(jnp.finfo(jnp.float32).min) <= mask_value < 0:
        raise ValueError(
            f"mask_value must be finite in float32 and below 0, but is {mask_value}. It "
            "tells the largest logit of a row without keys, which is minus infinity."
        )
    if sinks is None:
        return
    check_rank("sinks", sinks, 1)
    if sinks.shape != (num_heads,):
        raise ValueError(
            f"sinks must have one value a head, shape {(num_heads,)}, but its shape is "
            f"{sinks.shape}."
        )
    check_floating(sinks=sinks)
    if return_residuals:
        raise ValueError(
            "return_residuals=True and sinks exclude each other: a sink belongs to the "
            "merged result, and would be counted once a part."
        )


def sm_scale_or_default(sm_scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if sm_scale is None else float(sm_scale)


def scale_per_head(
    name: str, scale: Scale | None, num_kv_heads: int
) -> Float[Array, " num_kv_heads"] | None:
    if scale is None:
        return None
    scale = jnp.asarray(scale, jnp.float32)
    if scale.shape not in ((), (num_kv_heads,)):
        raise ValueError(
            f"{name} must be a scalar or one value a kv head, shape {(num_kv_heads,)}, "
            f"but its shape is {scale.shape}."
        )
    return jnp.broadcast_to(scale, (num_kv_heads,))
