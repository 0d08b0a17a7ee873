"""Decoders built on `eqx_paged`, and the embedded checkpoint's tasks."""

from . import _tasks as tasks
from ._chat import ChatTemplate as ChatTemplate, load_chat_template as load_chat_template
from ._checkpoint import Checkpoint as Checkpoint, load_checkpoint as load_checkpoint
from ._config import DecoderConfig as DecoderConfig
from ._decoder import Decoder as Decoder
from ._hub import find_checkpoint as find_checkpoint
from ._save import save_checkpoint as save_checkpoint
from ._tokenizer import (
    load_stop_tokens as load_stop_tokens,
    load_tokenizer as load_tokenizer,
)


__all__ = [
    "ChatTemplate",
    "Checkpoint",
    "Decoder",
    "DecoderConfig",
    "find_checkpoint",
    "load_chat_template",
    "load_checkpoint",
    "load_stop_tokens",
    "load_tokenizer",
    "save_checkpoint",
    "tasks",
]
