"""Checkpoints in the layout in which models are published."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from eqx_paged import PagedAttention, RaggedAttention
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

from ._config import DecoderConfig
from ._decoder import Decoder
from ._files import existing_directory, existing_file
from ._tensors import Source, tensor_sources
from ._weight_files import is_derived, stored_tensors, StoredTensor


CONFIG = "config.json"
# The output matrix of a decoder whose embedding is another one.
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# One for all parameters, or what to give each by its path.
Shardings = Sharding | Callable[[str], Sharding]


@dataclasses.dataclass(frozen=True)
class StoredParameter:
    """One of a decoder's parameters in a file, not read yet.

    **Arguments:**

    - `shape`: of the parameter.
    - `tensor`: what holds it.
    - `rows`: which of the tensor's rows it is, first and past the last.
    """

    shape: tuple[int, ...]
    tensor: StoredTensor
    rows: tuple[int, int]

    def dtype(self, asked: DTypeLike | None) -> np.dtype:
        """The dtype that it is loaded in: the one asked for, or else the stored one."""
        stored = self.tensor.dtype
        assert stored is not None, "a checkpoint of another dtype is refused"
        # Without JAX's 64-bit mode there is no float64.
        return jnp.dtype(jax.dtypes.canonicalize_dtype(asked or stored))

    def load(self, dtype: np.dtype, sharding: Sharding | None) -> Array:
        """Puts it where `sharding` says; where JAX puts things if None."""
        if sharding is None:
            return jax.device_put(self._read([(0, size) for size in self.shape], dtype))
        devices_of: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        indices = sharding.addressable_devices_indices_map(self.shape)
        for device, index in indices.items():
            assert index is not None, "every device of a sharding has a part"
            sized = zip(index, self.shape, strict=True)
            spans = tuple(part.indices(size)[:2] for part, size in sized)
            devices_of.setdefault(spans, []).append(device)
        parts = []
        for spans, devices in devices_of.items():
            # Read once for all devices that hold the same.
            part = self._read(spans, dtype)
            parts += [jax.device_put(part, device) for device in devices]
            # Else a device that copies later would keep several parts waiting here.
            jax.block_until_ready(parts)
        return jax.make_array_from_single_device_arrays(self.shape, sharding, parts)

    def _read(self, spans: Sequence[tuple[int, int]], dtype: np.dtype) -> np.ndarray:
        (start, stop), *others = spans
        first, _ = self.rows
        return self.tensor.read([(first + start, first + stop), *others], dtype)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found to fit its configuration.

    No weight has been read yet: `num_bytes` says what they will take, `load` reads them.

    **Arguments:**

    - `config`: what it is a decoder of.
    - `parameters`: where each parameter is, by its path in the decoder, such as
        `layers.0.self_attn.q_proj.weight`.
    """

    config: DecoderConfig
    parameters: Mapping[str, StoredParameter]

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "Checkpoint":
        """Reads the configuration and the headers of the weight files.

        **Arguments:**

        - `directory`: holds `config.json`, and `model.safetensors` or the shards that
            `model.safetensors.index.json` lists.

        **Returns:**

        The checkpoint. A missing directory or file is a `FileNotFoundError`; a file that
        is broken, or whose tensors are not those that the configuration asks for, is a
        `ValueError` that names them all.
        """
        root = existing_directory(directory)
        config = DecoderConfig.from_file(existing_file(root, CONFIG))
        shapes = {path: x.shape for path, x in named_parameters(_abstract(config)).items()}
        sources = tensor_sources(config)
        stored = stored_tensors(root)
        _check_tensors(root, config, _tensor_shapes(shapes, sources), stored)
        parameters = {
            path: StoredParameter(shape, stored[source.name], _rows(source, shape))
            for path, shape in shapes.items()
            for source in [sources[path]]
        }
        return cls(config, parameters)

    def dtype(self, asked: DTypeLike | None = None) -> np.dtype:
        """The dtype of the embedding once it is loaded, which is that of the activations.

        **Arguments:**

        - `asked`: as `dtype` in `load`.

        **Returns:**

        The dtype.
        """
        return self.parameters["embed_tokens.weight"].dtype(asked)

    def num_bytes(self, dtype: DTypeLike | None = None) -> int:
        """What the weights take once they are loaded.

        **Arguments:**

        - `dtype`: as in `load`.

        **Returns:**

        The number of bytes.
        """
        return sum(
            math.prod(parameter.shape) * parameter.dtype(dtype).itemsize
            for parameter in self.parameters.values()
        )

    def load(
        self,
        dtype: DTypeLike | None = None,
        *,
        attention: PagedAttention | RaggedAttention | None = None,
        sharding: Shardings | None = None,
    ) -> Decoder:
        """Reads the weights, one after the other.

        **Arguments:**

        - `dtype`: what to convert them to; as stored if None.
        - `attention`: as in `models.Decoder`.
        - `sharding`: how they lie on the devices: one sharding for all, or a function
            that gives one for a parameter's path. JAX's default device if None. A
            device's part alone is read for it.

        **Returns:**

        The decoder. Besides it, memory is taken for one weight at a time. A sharding
        that does not fit a weight's shape is a `ValueError`, before any is read.
        """
        shardings = _shardings(self.parameters, sharding)
        like = _abstract(self.config, attention)
        weights = []
        for path, parameter in self.parameters.items():
            weight = parameter.load(parameter.dtype(dtype), shardings[path])
            weights.append(jax.block_until_ready(weight))
        return eqx.tree_at(lambda d: list(named_parameters(d).values()), like, weights)


def load_checkpoint(
    directory: str | os.PathLike,
    dtype: DTypeLike | None = None,
    *,
    attention: PagedAttention | RaggedAttention | None = None,
    sharding: Shardings | None = None,
) -> Decoder:
    """Loads a decoder: `Checkpoint.open(directory).load(...)`.

    **Arguments:**

    - `directory`: as in `Checkpoint.open`.
    - `dtype`, `attention`, `sharding`: as in `Checkpoint.load`.

    **Returns:**

    The decoder. Errors as there.
    """
    checkpoint = Checkpoint.open(directory)
    return checkpoint.load(dtype, attention=attention, sharding=sharding)


def named_parameters(decoder: Decoder) -> dict[str, Any]:
    """A decoder's weights by their path in it."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): weight
        for path, weight in jax.tree_util.tree_leaves_with_path(decoder)
    }


def _abstract(
    config: DecoderConfig, attention: PagedAttention | RaggedAttention | None = None
) -> Decoder:
    """A decoder of shapes."""
    return eqx.filter_eval_shape(
        lambda key: Decoder(config, attention=attention, key=key), jax.random.key(0)
    )


def _rows(source: Source, shape: tuple[int, ...]) -> tuple[int, int]:
    return (0, shape[0]) if source.rows is None else source.rows


def _tensor_shapes(
    shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, Source]
) -> dict[str, tuple[int, ...]]:
    """What shape each published tensor has that holds the parameters."""
    ends: dict[str, int] = {}
    whole: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        name = sources[path].name
        ends[name] = max(ends.get(name, 0), _rows(sources[path], shape)[1])
        whole[name] = (ends[name], *shape[1:])
    return whole


def _check_tensors(
    root: pathlib.Path,
    config: DecoderConfig,
    wanted: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
) -> None:
    faults = [f"missing {name}" for name in wanted if name not in stored]
    for name, tensor in stored.items():
        if name in wanted:
            faults += _faults(tensor, wanted[name])
        elif name == HEAD and config.tie_word_embeddings:
            # Some files store the output matrix again, although it is the embedding.
            embedding = stored.get(EMBEDDING, tensor)
            if not tensor.holds_same(embedding):
                faults.append(f"{HEAD} is not {EMBEDDING}, to which it is tied")
        elif not is_derived(name):
            faults.append(f"unexpected {name}")
    if faults:
        raise ValueError(f"{root}: wrong tensors: {'; '.join(sorted(faults))}")


def _faults(tensor: StoredTensor, shape: tuple[int, ...]) -> list[str]:
    faults = []
    if tensor.shape != shape:
        faults.append(f"{tensor.name} is {tensor.shape}, not {shape}")
    if tensor.dtype is None:
        faults.append(
            f"{tensor.name} is {tensor.format_dtype}, not a floating-point type of 16 bits"
            " or more"
        )
    return faults


def _shardings(
    parameters: Mapping[str, StoredParameter], sharding: Shardings | None
) -> dict[str, Sharding | None]:
    shardings: dict[str, Sharding | None] = {}
    faults = []
    for path, parameter in parameters.items():
        given = sharding(path) if callable(sharding) else sharding
        try:
            if given is not None:
                given.shard_shape(parameter.shape)
        except ValueError as error:
            faults.append(f"{path} {parameter.shape}: {error}")
        shardings[path] = given
    if faults:
        raise ValueError(f"a sharding does not fit: {'; '.join(faults)}")
    return shardings
