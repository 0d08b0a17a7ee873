"""What the Pallas kernels of all platforms share."""

from typing import Any

import jax
from jax.sharding import ManualAxisType


LOG2_E = 1.4426950408889634


def result_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result of a kernel, which under `jax.shard_map` knows of no mesh axis."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType())
