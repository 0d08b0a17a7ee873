"""Decoders built on `eqx_paged`, and the embedded checkpoint's tasks."""

from . import _tasks as tasks
from ._checkpoint import (
    load_checkpoint as load_checkpoint,
    load_tokenizer as load_tokenizer,
    save_checkpoint as save_checkpoint,
)
from ._config import DecoderConfig as DecoderConfig
from ._decoder import Decoder as Decoder


__all__ = [
    "Decoder",
    "DecoderConfig",
    "load_checkpoint",
    "load_tokenizer",
    "save_checkpoint",
    "tasks",
]
