from .api import ragged_paged_attention as ragged_paged_attention
