"""How the tokens of a page lie in memory.

Plain     [num_pages, num_kv_heads, page_size, head_dim]
Rows      [num_pages, num_kv_heads, page_size / n, 128] with n = 128 / head_dim: the same
          numbers in the same order, n consecutive tokens side by side in a row.
Padded    [num_pages, num_kv_heads, page_size, lanes]: `head_dim` rounded up to a multiple
          of 128, the rest zeros; on a TPU, for a `head_dim` that does not divide 128.

A TPU tile is 128 lanes wide, so a smaller `head_dim` stored plainly would be copied whole
at every kernel call. Rows cost nothing on a CPU or GPU: they are a reshape.

bfloat16 may be stored as its bits in uint16. XLA's CPU compiler of jax 0.10 turns a
bfloat16 scatter or gather into a float32 copy of the whole, but leaves integers alone.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real


LANES = 128


def storage_shape(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int
) -> tuple[int, int, int, int]:
    """The stored shape of a layer's keys or values, on the default backend."""
    lanes = head_dim
    if LANES % head_dim == 0:
        # A page smaller than a row stays plain: 128 lanes would be taken for a row.
        lanes = LANES if page_size % (LANES // head_dim) == 0 else head_dim
    elif jax.default_backend() == "tpu":
        lanes = -(-head_dim // LANES) * LANES
    return num_pages, num_kv_heads, page_size // tokens_per_row(lanes, head_dim), lanes


def storage_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The stored dtype of a cache that holds `dtype`, on the default backend."""
    dtype = jnp.dtype(dtype)  # a name is not equal to what it names
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(dtype)


def value_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of the values held in an array stored as `dtype`."""
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.uint16 else dtype)


def tokens_per_row(lanes: int, head_dim: int) -> int:
    """The number of tokens side by side in a stored row of lanes."""
    return LANES // head_dim if lanes == LANES and LANES % head_dim == 0 else 1


def lanes_per_token(lanes: int, head_dim: int) -> int:
    """How many of a stored row's lanes each of its tokens has."""
    return lanes // tokens_per_row(lanes, head_dim)


def padded(
    values: Real[Array, "*shape head_dim"], lanes: int
) -> Real[Array, "*shape width"]:
    """Values with zeros in the lanes that a stored token has beyond its own."""
    beyond = lanes_per_token(lanes, values.shape[-1]) - values.shape[-1]
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, beyond)])


def page_size_of(
    pages: Real[Array, "num_pages num_kv_heads rows lanes"], head_dim: int
) -> int:
    """The number of tokens of a page, in any form."""
    return pages.shape[2] * tokens_per_row(pages.shape[3], head_dim)


def unpack(
    pages: Real[Array, "*pages rows lanes"], head_dim: int
) -> Real[Array, "*pages page_size head_dim"]:
    """Stored pages as values, one token a row."""
    *shape, rows, lanes = pages.shape
    page_size = rows * tokens_per_row(lanes, head_dim)
    values = values_of(pages).reshape(*shape, page_size, lanes_per_token(lanes, head_dim))
    return values[..., :head_dim]


def values_of(stored: Real[Array, "*shape"]) -> Real[Array, "*shape"]:
    """The numbers that an array stores."""
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored


def pack(values: Float[Array, "*shape"], dtype: DTypeLike) -> Real[Array, "*shape"]:
    """Values in the form in which an array of `dtype` stores them."""
    values = values.astype(value_dtype(dtype))
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values, jnp.uint16)
    return values
