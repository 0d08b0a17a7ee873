"""The tensors in a checkpoint's weight files, found at once and read one part at a time."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import safetensors

from ._files import existing_file, read_object


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Older files also hold the rotary frequencies, which the configuration determines.
_DERIVED = ".rotary_emb.inv_freq"
# What the format calls the types that weights may have.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Elements that are read and converted together.
_BLOCK = 2**20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, of which only the header was read.

    **Arguments:**

    - `path`, `name`: the file, and the tensor's name in it.
    - `shape`: of the whole tensor.
    - `format_dtype`: its dtype, as the format writes it.
    """

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    format_dtype: str

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype, or None if it is no floating-point type of 16 bits or more."""
        name = _DTYPES.get(self.format_dtype)
        return None if name is None else jnp.dtype(name)

    def read(self, spans: Sequence[tuple[int, int]], dtype: np.dtype) -> np.ndarray:
        """Copies a part, whose bytes alone are read, out of the file.

        **Arguments:**

        - `spans`: the first and the past-last place on each axis.
        - `dtype`: what to convert it to.

        **Returns:**

        The part, in memory of its own: no more than some MiB are taken besides. The file
        is mapped for the time of the call only, so that its pages do not add up.
        """
        part = np.empty([stop - start for start, stop in spans], dtype)
        for rows, block in self._blocks(spans):
            part[rows] = block
        return part

    def whole(self) -> np.ndarray:
        """Copies all of it, as it is."""
        with _opened(self.path) as file:
            return file.get_tensor(self.name)

    def holds_same(self, other: "StoredTensor") -> bool:
        """Whether two tensors are the same, bit for bit."""
        if (self.shape, self.format_dtype) != (other.shape, other.format_dtype):
            return False
        spans = [(0, size) for size in self.shape]
        pairs = zip(self._blocks(spans), other._blocks(spans), strict=True)
        return all(mine.tobytes() == its.tobytes() for (_, mine), (_, its) in pairs)

    def _blocks(
        self, spans: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """A part's rows, some at a time, and which of the part's rows they are."""
        (first, end), *others = spans
        width = math.prod(stop - start for start, stop in others)
        step = max(1, _BLOCK // max(1, width))
        with _opened(self.path) as file:
            stored = file.get_slice(self.name)
            for start in range(first, end, step):
                stop = min(start + step, end)
                block = stored[(slice(start, stop), *(slice(*span) for span in others))]
                yield slice(start - first, stop - first), block


def weight_files(root: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a checkpoint's weights.

    **Arguments:**

    - `root`: the checkpoint's directory.

    **Returns:**

    `model.safetensors`, or else the shards that its index lists, in order of name. A
    `FileNotFoundError` names all that are missing.
    """
    index = root / INDEX
    if (root / WEIGHTS).is_file() or not index.is_file():
        return [existing_file(root, WEIGHTS)]
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: not an index of weight files")
    for name in weight_map.values():
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise ValueError(f"{index}: {name!r} is not the name of a weight file")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{root}: no such weight file: {', '.join(missing)}")
    return [root / name for name in names]


def stored_tensors(root: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, by name.

    **Arguments:**

    - `root`: the checkpoint's directory.

    **Returns:**

    All tensors of all weight files. A `ValueError` names a file that is broken, or a
    tensor that is in two files.
    """
    found: dict[str, StoredTensor] = {}
    for path in weight_files(root):
        for tensor in _tensors_of(path):
            if tensor.name in found:
                other = found[tensor.name].path.name
                raise ValueError(f"{path}: {tensor.name} is in {other} too")
            found[tensor.name] = tensor
    return found


def file_notes(path: pathlib.Path) -> dict[str, str] | None:
    """What a weight file notes besides its tensors."""
    with _opened(path) as file:
        return file.metadata()


def is_derived(name: str) -> bool:
    """Whether a tensor follows from the configuration."""
    return name.endswith(_DERIVED)


def _tensors_of(path: pathlib.Path) -> list[StoredTensor]:
    try:
        with _opened(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            return [
                StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in parts.items()
            ]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error


def _opened(path: pathlib.Path) -> safetensors.safe_open:
    return safetensors.safe_open(path, framework="np")
