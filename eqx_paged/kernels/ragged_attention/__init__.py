from .api import (
    ragged_gqa as ragged_gqa,
    ragged_mha as ragged_mha,
    ragged_mqa as ragged_mqa,
)
from .cost import mha_cost_estimate as mha_cost_estimate
