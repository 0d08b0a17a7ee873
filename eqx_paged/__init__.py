"""Paged and ragged attention for Equinox."""

from importlib.metadata import version as _version

from . import reference as reference, samplers as samplers
from ._attention import (
    PagedAttention as PagedAttention,
    PagedMultiheadAttention as PagedMultiheadAttention,
    RaggedAttention as RaggedAttention,
)
from ._batch import RaggedBatch as RaggedBatch
from ._beam_search import beam_search as beam_search
from ._beam_step import Hypotheses as Hypotheses
from ._cache import PagedKVCache as PagedKVCache
from ._draft_model import DraftModel as DraftModel
from ._generate import (
    generate as generate,
    Generation as Generation,
    Sampler as Sampler,
)
from ._generation_state import Drafted as Drafted
from ._kv_pages import KVPages as KVPages
from ._log_probs import LogProbs as LogProbs
from ._model import Model as Model
from ._page_table import PageCopies as PageCopies, PageTable as PageTable
from ._prefix_index import PrefixIndex as PrefixIndex
from ._prompt_lookup import PromptLookup as PromptLookup
from ._ragged_cache import RaggedKV as RaggedKV, RaggedKVCache as RaggedKVCache
from ._results import RESULTS as RESULTS
from ._stream import Stream as Stream, stream as stream
from .kernels._gpu import (
    MosaicGPUConfig as MosaicGPUConfig,
    TritonConfig as TritonConfig,
)
from .kernels._online_softmax import merge_residuals as merge_residuals
from .kernels._tpu import TPUConfig as TPUConfig
from .kernels.paged_attention import paged_attention as paged_attention
from .kernels.ragged_attention import (
    mha_cost_estimate as mha_cost_estimate,
    ragged_gqa as ragged_gqa,
    ragged_mha as ragged_mha,
    ragged_mqa as ragged_mqa,
)
from .kernels.ragged_paged_attention import (
    ragged_paged_attention as ragged_paged_attention,
)
from .kernels.write_kv import write_kv as write_kv
from .samplers import greedy as greedy


__version__ = _version("eqx_paged")
