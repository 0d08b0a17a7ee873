"""Writing checkpoints in the layout in which models are published."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Array

from ._checkpoint import Checkpoint, CONFIG, EMBEDDING, HEAD, named_parameters
from ._decoder import Decoder
from ._files import partial_path, read_object, replace_file
from ._tensors import tensor_sources
from ._weight_files import file_notes, INDEX, stored_tensors, WEIGHTS


# What a published checkpoint holds besides its weights.
COMPANIONS = (
    CONFIG,
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# Without this note other programs do not take the file for a model.
_NOTE = {"format": "pt"}


def save_checkpoint(
    decoder: Decoder,
    directory: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
) -> None:
    """Saves a decoder's weights and configuration. Each file is replaced as a whole.

    **Arguments:**

    - `decoder`: what to save, in the dtype it has.
    - `directory`: where to; made if it does not exist.
    - `like`: a checkpoint of the same configuration whose layout to keep: the weights
        are cut into the same files, and its configuration, its tokenizer and what else
        belongs to a model are copied. Saving unchanged what was loaded from it gives
        the same files bit for bit, if it was written by safetensors. If None, there is
        one file of weights, and a configuration.
    """
    root = pathlib.Path(directory)
    layout = _own_layout(decoder) if like is None else _layout_of(like, decoder)
    if WEIGHTS not in layout.weights and (root / WEIGHTS).exists():
        raise ValueError(f"{root / WEIGHTS}: would be read instead of what is saved")
    root.mkdir(parents=True, exist_ok=True)
    for name, makers in layout.weights.items():
        tensors = {tensor: make() for tensor, make in makers.items()}
        partial = partial_path(root / name)
        safetensors.numpy.save_file(tensors, partial, layout.notes[name])
        os.replace(partial, root / name)
    for name, content in layout.others.items():
        replace_file(root / name, content)


# Gives a tensor when its file is written, so that no more than a file's are in memory.
_Maker = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What is written: each weight file's tensors and notes, and the other files."""

    weights: Mapping[str, Mapping[str, _Maker]]
    notes: Mapping[str, dict[str, str] | None]
    others: Mapping[str, bytes]


def _own_layout(decoder: Decoder) -> _Layout:
    return _Layout(
        weights={WEIGHTS: _published_tensors(decoder)},
        notes={WEIGHTS: _NOTE},
        others={CONFIG: _json(_with_dtype(decoder.config.to_dict(), decoder))},
    )


def _layout_of(like: str | os.PathLike, decoder: Decoder) -> _Layout:
    source = Checkpoint.open(like)
    if source.config != decoder.config:
        raise ValueError(f"{like}: is of another configuration than what is saved")
    root = pathlib.Path(like)
    made = _published_tensors(decoder)
    weights: dict[str, dict[str, _Maker]] = {}
    for name, tensor in stored_tensors(root).items():
        # What is not a parameter is the embedding again, or follows from the config.
        make = made.get(EMBEDDING if name == HEAD and name not in made else name)
        weights.setdefault(tensor.path.name, {})[name] = make or tensor.whole
    others = {
        name: (root / name).read_bytes() for name in COMPANIONS if (root / name).is_file()
    }
    if WEIGHTS not in weights:
        others[INDEX] = (root / INDEX).read_bytes()
    if _is_converted(decoder, source):
        others[CONFIG] = _json(_with_dtype(read_object(root / CONFIG), decoder))
        if INDEX in others:
            others[INDEX] = _json(_with_size(read_object(root / INDEX), decoder))
    notes = {name: file_notes(root / name) for name in weights}
    return _Layout(weights, notes, others)


def _published_tensors(decoder: Decoder) -> dict[str, _Maker]:
    sources = tensor_sources(decoder.config)
    parts: dict[str, dict[int, Array]] = {}
    for path, parameter in named_parameters(decoder).items():
        first, _ = sources[path].rows or (0, 0)
        parts.setdefault(sources[path].name, {})[first] = parameter
    return {name: functools.partial(_joined, found) for name, found in parts.items()}


def _joined(parts: Mapping[int, Array]) -> np.ndarray:
    first, *others = (np.asarray(parts[start]) for start in sorted(parts))
    return np.concatenate([first, *others]) if others else first


def _is_converted(decoder: Decoder, source: Checkpoint) -> bool:
    return any(
        parameter.dtype != source.parameters[path].tensor.dtype
        for path, parameter in named_parameters(decoder).items()
    )


def _with_dtype(config: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    dtype = decoder.embed_tokens.weight.dtype.name
    # Older programs read `torch_dtype`, newer ones `dtype`.
    return {**config, "torch_dtype": dtype, "dtype": dtype}


def _with_size(index: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
    size = sum(parameter.nbytes for parameter in named_parameters(decoder).values())
    return {**index, "metadata": {**index.get("metadata", {}), "total_size": size}}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
