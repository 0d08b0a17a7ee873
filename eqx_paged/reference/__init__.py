"""The definitions: what every implementation is held to."""

from ..kernels.paged_attention.reference import paged_attention as paged_attention
from ..kernels.ragged_attention.reference import (
    ragged_gqa as ragged_gqa,
    ragged_mha as ragged_mha,
    ragged_mqa as ragged_mqa,
)
from ..kernels.ragged_paged_attention.reference import (
    ragged_paged_attention as ragged_paged_attention,
)
from ..kernels.write_kv.reference import write_kv as write_kv
