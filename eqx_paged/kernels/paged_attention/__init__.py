from .api import paged_attention as paged_attention
