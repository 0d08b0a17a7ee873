"""Shared type aliases."""

from typing import Literal

from jaxtyping import Array, Float


Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]

# A factor on stored keys or values: one for all heads, or one a head.
Scale = float | Float[Array, ""] | Float[Array, " num_kv_heads"]
