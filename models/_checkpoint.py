"""Checkpoints in the layout in which they are published."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from eqx_paged import PagedAttention, RaggedAttention
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from ._config import DecoderConfig
from ._decoder import Decoder
from ._tensors import Source, tensor_sources


_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = "tokenizer.json"
# Older files also hold the rotary frequencies, which the configuration determines.
_DERIVED = ".rotary_emb.inv_freq"
_HEAD = "lm_head.weight"


def load_checkpoint(
    directory: str | os.PathLike,
    dtype: DTypeLike | None = None,
    *,
    attention: PagedAttention | RaggedAttention | None = None,
) -> Decoder:
    """Loads a decoder.

    **Arguments:**

    - `directory`: holds `config.json`, and `model.safetensors` or the shards that
        `model.safetensors.index.json` lists.
    - `dtype`: what to convert the weights to; as stored if None.
    - `attention`: as in `models.Decoder`.

    **Returns:**

    The decoder. A missing directory or file is a `FileNotFoundError`; a file that is
    broken, or whose tensors are not those that the configuration asks for, is a
    `ValueError` that names them all.
    """
    root = _existing(directory)
    config = DecoderConfig.from_file(_file(root, _CONFIG))
    like = eqx.filter_eval_shape(
        lambda key: Decoder(config, attention=attention, key=key), jax.random.key(0)
    )
    if attention is not None:
        like = eqx.tree_at(lambda d: d.attention, like, attention)
    wanted = _named_weights(like)
    stored = _read_tensors(_weight_files(root))
    if config.tie_word_embeddings:
        # Some files store the output matrix again, although it is the embedding.
        stored.pop(_HEAD, None)
    sources = tensor_sources(config)
    _check_tensors(root, _published_shapes(wanted, sources), stored)
    weights = [jnp.asarray(_cut(stored, sources[path]), dtype) for path in wanted]
    return eqx.tree_at(lambda d: list(_named_weights(d).values()), like, weights)


def save_checkpoint(decoder: Decoder, directory: str | os.PathLike) -> None:
    """Saves a decoder's weights and configuration. Each file is replaced as a whole.

    **Arguments:**

    - `decoder`: what to save, in the dtype it has.
    - `directory`: where to; made if it does not exist.
    """
    root = pathlib.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    tensors = _joined(_named_weights(decoder), tensor_sources(decoder.config))
    dtype = next(iter(tensors.values())).dtype.name
    # Older programs read `torch_dtype`, newer ones `dtype`.
    config = {**decoder.config.to_dict(), "torch_dtype": dtype, "dtype": dtype}
    # Without this note other programs do not take the file for a model.
    weights = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    _write(root / _WEIGHTS, weights)
    _write(root / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    **Arguments:**

    - `directory`: holds `tokenizer.json`.

    **Returns:**

    The tokenizer. Errors as in `load_checkpoint`.
    """
    path = _file(_existing(directory), _TOKENIZER)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(f"{path}: not a tokenizer ({error})") from error


def _named_weights(decoder: Decoder) -> dict[str, Any]:
    """The weights by the fields on the way to them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): weight
        for path, weight in jax.tree_util.tree_leaves_with_path(decoder)
    }


def _published_shapes(
    weights: Mapping[str, Any], sources: Mapping[str, Source]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the stored tensors."""
    shapes = {}
    for path, weight in weights.items():
        source = sources[path]
        num_rows = weight.shape[0] if source.rows is None else source.rows[1]
        # Parts come in the order of their rows: the last one ends the tensor.
        shapes[source.name] = (num_rows, *weight.shape[1:])
    return shapes


def _cut(stored: Mapping[str, np.ndarray], source: Source) -> np.ndarray:
    tensor = stored[source.name]
    return tensor if source.rows is None else tensor[slice(*source.rows)]


def _joined(
    weights: Mapping[str, Any], sources: Mapping[str, Source]
) -> dict[str, np.ndarray]:
    """The weights as the tensors that are stored."""
    parts: dict[str, list[np.ndarray]] = {}
    for path, weight in weights.items():
        parts.setdefault(sources[path].name, []).append(np.asarray(weight))
    return {
        name: part[0] if len(part) == 1 else np.concatenate(part)
        for name, part in parts.items()
    }


def _existing(directory: str | os.PathLike) -> pathlib.Path:
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such directory")
    return root


def _file(root: pathlib.Path, name: str) -> pathlib.Path:
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _weight_files(root: pathlib.Path) -> list[pathlib.Path]:
    index = root / _INDEX
    if (root / _WEIGHTS).is_file() or not index.is_file():
        return [_file(root, _WEIGHTS)]
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = set(shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of weight files") from error
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise ValueError(f"{index}: {name!r} is not the name of a weight file")
    return [_file(root, name) for name in sorted(names)]


def _read_tensors(paths: Iterable[pathlib.Path]) -> dict[str, np.ndarray]:
    tensors = {}
    for path in paths:
        try:
            with safetensors.safe_open(path, framework="np") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from error
    return {n: tensor for n, tensor in tensors.items() if not n.endswith(_DERIVED)}


def _check_tensors(
    root: pathlib.Path,
    wanted: dict[str, tuple[int, ...]],
    stored: dict[str, np.ndarray],
) -> None:
    faults = [f"missing {name}" for name in wanted if name not in stored]
    faults += [f"unexpected {name}" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        found, asked = stored[name], wanted[name]
        if found.shape != asked:
            faults.append(f"{name} is {found.shape}, not {asked}")
        elif not jnp.issubdtype(found.dtype, jnp.floating):
            faults.append(f"{name} is {found.dtype}, not a floating-point type")
    if faults:
        raise ValueError(f"{root}: wrong tensors: {'; '.join(sorted(faults))}")


def _write(path: pathlib.Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    os.replace(partial, path)
