"""Rows of a paged cache in a file. Runs on the host.

The file is safetensors: `page_indices`, `kv_lens` and `starts` of the rows, where pages are
counted from 0 in the file, and `layers.{i}.k`, `layers.{i}.v`, each `[pages, num_kv_heads,
page_size, head_dim]` in the dtype of the cache. Slots past a sequence's end are 0. The
metadata has the page size, and a checksum of all tensors.
"""

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ._checks import check_page_size
from ._kv_pages import KVPages
from ._page_table import PageTable
from ._results import RESULTS
from .kernels._pages import lanes_per_token, value_dtype


FORMAT = "eqx_paged rows 2"


class SavedRows(NamedTuple):
    """What a file holds, with the pages as the cache that reads it stores them."""

    page_indices: np.ndarray
    kv_lens: np.ndarray
    starts: np.ndarray
    layers: tuple[KVPages, ...]


def write(
    path: str | os.PathLike,
    layers: tuple[KVPages, ...],
    table: PageTable,
    rows: Sequence[int],
) -> None:
    """Writes rows, replacing the file only when the new one is complete."""
    chosen = _check_rows(rows, table.num_seqs)
    kv_lens, starts = (np.asarray(x)[chosen] for x in (table.kv_lens, table.starts))
    num_columns = -(-int(kv_lens.max(initial=0)) // table.page_size)
    used = _used(starts, kv_lens, num_columns, table.page_size)
    entries = np.asarray(table.page_indices)[chosen, :num_columns]
    pages, numbers = np.unique(entries[used], return_inverse=True)
    page_indices = np.zeros(used.shape, np.int32)
    page_indices[used] = numbers.reshape(-1)

    live = np.zeros(len(pages), np.int64)
    np.maximum.at(live, page_indices[used], _live_slots(kv_lens, used, table.page_size))
    tensors = {"page_indices": page_indices, "kv_lens": kv_lens, "starts": starts}
    for i, layer in enumerate(layers):
        tensors[f"layers.{i}.k"] = _to_file(layer.k_pages[pages], layer, live)
        tensors[f"layers.{i}.v"] = _to_file(layer.v_pages[pages], layer, live)
    metadata = {"format": FORMAT, "page_size": str(table.page_size)}
    metadata["crc32"] = _checksum(tensors)
    _replace_file(path, safetensors.numpy.save(tensors, metadata))


def read(
    path: str | os.PathLike,
    layers: tuple[KVPages, ...],
    table: PageTable,
    rows: Sequence[int],
) -> SavedRows:
    """Reads a file for a cache of these layers, and checks everything about it."""
    num_rows = len(_check_rows(rows, table.num_seqs))
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} does not hold rows of a cache: its format is "
            f"{metadata.get('format')!r}, not {FORMAT!r}."
        )
    _check_names(path, tensors, len(layers))
    if metadata.get("crc32") != _checksum(tensors):
        raise ValueError(
            f"{path} is damaged: the checksum of its tensors is {_checksum(tensors)}, but "
            f"was {metadata.get('crc32')}."
        )
    page_size = _page_size(path, metadata.get("page_size"))
    page_indices, kv_lens, starts = (
        tensors[name] for name in ("page_indices", "kv_lens", "starts")
    )
    _check_integers(path, page_indices, kv_lens, starts)
    if num_rows != len(kv_lens):
        raise ValueError(
            f"{path} holds {len(kv_lens)} rows, but {num_rows} rows were given to load "
            "them into."
        )
    num_pages = _check_table(path, page_indices, kv_lens, starts, page_size)
    page_indices, starts, sources = _repaged(
        page_indices, kv_lens, starts, page_size, table.page_size
    )

    def pages(name, layer):
        values = tensors[name]
        _check_values(path, name, values, (num_pages, page_size), layer)
        return _to_layer(_gathered(values, sources, table.page_size), layer)

    return SavedRows(
        page_indices=page_indices,
        kv_lens=kv_lens,
        starts=starts,
        layers=tuple(
            KVPages(
                pages(f"layers.{i}.k", layer), pages(f"layers.{i}.v", layer), layer.head_dim
            )
            for i, layer in enumerate(layers)
        ),
    )


def place(
    table: PageTable, saved: SavedRows, rows: Sequence[int]
) -> tuple[PageTable, np.ndarray, RESULTS]:
    """Finds a page for each saved one. Returns the table, those pages and the result."""
    targets = np.asarray(rows, np.int32)
    num_new = saved.layers[0].num_pages
    num_free = int(table.num_free_pages)
    nothing = np.zeros(0, np.int32)
    if saved.kv_lens.max(initial=0) > table.max_len:
        return table, nothing, RESULTS.sequence_too_long
    if num_new > num_free:
        return table, nothing, RESULTS.out_of_pages
    if np.any(np.asarray(table.kv_lens)[targets] > 0):
        return table, nothing, RESULTS.row_in_use

    pages = np.asarray(table.free_pages)[num_free - num_new : num_free][::-1]
    num_columns = saved.page_indices.shape[1]
    used = _used(saved.starts, saved.kv_lens, num_columns, table.page_size)
    entries = np.zeros((len(targets), table.pages_per_seq), np.int32)
    entries[:, :num_columns][used] = pages[saved.page_indices[used]]
    counts = np.bincount(saved.page_indices[used], minlength=num_new)
    table = PageTable(
        page_indices=table.page_indices.at[targets].set(entries),
        kv_lens=table.kv_lens.at[targets].set(saved.kv_lens),
        starts=table.starts.at[targets].set(saved.starts),
        ref_counts=table.ref_counts.at[pages].set(counts.astype(np.int32)),
        free_pages=table.free_pages,
        num_free_pages=jnp.array(num_free - num_new, jnp.int32),
        page_size=table.page_size,
    )
    return table, pages, RESULTS.successful


def _check_rows(rows, num_seqs):
    rows = np.asarray(rows)
    if rows.ndim != 1 or rows.size and not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"rows must be a list of integers, but is {rows.tolist()}.")
    rows = rows.astype(np.int64)
    if len(np.unique(rows)) != len(rows):
        raise ValueError(f"rows must be named once each, but are {rows.tolist()}.")
    if np.any((rows < 0) | (rows >= num_seqs)):
        raise ValueError(f"rows must be from 0 to {num_seqs - 1}, but are {rows.tolist()}.")
    return rows


def _used(starts, kv_lens, num_columns, page_size):
    """Which entries of a table are pages."""
    first_slots = np.arange(num_columns) * page_size
    return (first_slots >= starts[:, None]) & (first_slots < kv_lens[:, None])


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    crc = 0
    for name in sorted(tensors):
        x = tensors[name]
        crc = zlib.crc32(f"{name} {x.dtype} {x.shape}".encode(), crc)
        crc = zlib.crc32(x.reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _live_slots(kv_lens, used, page_size):
    first_slots = np.arange(used.shape[1]) * page_size
    return np.minimum(kv_lens[:, None] - first_slots, page_size)[used]


def _to_file(pages, layer, live):
    # Slots past the end may hold what another sequence left there.
    stored = np.asarray(pages).view(value_dtype(pages.dtype))
    values = stored.reshape(_shape_of_tokens(len(pages), layer))[..., : layer.head_dim]
    dead = np.arange(layer.page_size) >= live[:, None]
    return np.where(dead[:, None, :, None], np.zeros((), values.dtype), values)


def _to_layer(values, layer):
    """Pages `[pages, num_kv_heads, page_size, head_dim]` as a layer stores them."""
    pages = np.zeros(_shape_of_tokens(len(values), layer), values.dtype)
    pages[..., : layer.head_dim] = values
    pages = pages.reshape(len(values), *layer.k_pages.shape[1:])
    return jax.device_put(pages.view(np.dtype(layer.k_pages.dtype)))


def _shape_of_tokens(num_pages, layer):
    lanes = lanes_per_token(layer.k_pages.shape[3], layer.head_dim)
    return num_pages, layer.num_kv_heads, layer.page_size, lanes


# --- Another page size


def _repaged(page_indices, kv_lens, starts, old, new):
    """A table for pages of another size, and what each of them is made of.

    In units of the smaller size, of which a page of either is a whole number: `sources`
    is `[pages, units a page]`, with -1 for a unit that no page of the file holds.
    """
    unit = min(old, new)
    num_columns = -(-int(kv_lens.max(initial=0)) // new)
    slots = np.arange(num_columns * (new // unit)) * unit
    known = (slots >= starts[:, None]) & (slots < kv_lens[:, None])
    units = np.full(known.shape, -1)
    row, column = np.nonzero(known)
    page = page_indices[row, slots[column] // old]
    units[known] = page * (old // unit) + slots[column] % old // unit
    units = units.reshape(len(kv_lens), num_columns, new // unit)
    starts = (starts // new * new).astype(np.int32)
    used = _used(starts, kv_lens, num_columns, new)
    # Pages of the same units are one, if they are at the same place of a sequence.
    places = np.broadcast_to(np.arange(num_columns)[None, :, None], (*used.shape, 1))
    keys = np.concatenate([units, places], axis=2)[used]
    keys, numbers = np.unique(keys, axis=0, return_inverse=True)
    table = np.zeros(used.shape, np.int32)
    table[used] = numbers.reshape(-1)
    return table, starts, keys[:, :-1]


def _gathered(values, sources, page_size):
    """Pages of units of pages of another size."""
    num_pages, num_heads, old, head_dim = values.shape
    unit = page_size // sources.shape[1]
    units = values.reshape(num_pages, num_heads, old // unit, unit, head_dim)
    units = units.swapaxes(1, 2)
    units = units.reshape(num_pages * (old // unit), num_heads, unit, head_dim)
    units = np.concatenate([units, np.zeros_like(units, shape=(1, *units.shape[1:]))])
    pages = units[sources].swapaxes(1, 2)
    return pages.reshape(len(sources), num_heads, page_size, head_dim)


# --- Checks of a file


def _page_size(path, text):
    try:
        check_page_size(int(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has pages of {text!r} tokens: {error}") from error
    return int(text)


def _check_values(path, name, values, pages, layer):
    num_pages, page_size = pages
    dtype = value_dtype(layer.k_pages.dtype)
    shape = (num_pages, layer.num_kv_heads, page_size, layer.head_dim)
    if values.shape != shape or values.dtype != dtype:
        raise ValueError(
            f"{name} of {path} is {values.dtype}{list(values.shape)}, but this cache needs "
            f"{dtype}{list(shape)}."
        )


def _check_names(path, tensors, num_layers):
    wanted = {"page_indices", "kv_lens", "starts"}
    wanted |= {f"layers.{i}.{x}" for i in range(num_layers) for x in "kv"}
    if tensors.keys() != wanted:
        raise ValueError(
            f"{path} has tensors {sorted(tensors.keys() - wanted)} that a cache of "
            f"{num_layers} layers has not, and lacks {sorted(wanted - tensors.keys())}."
        )


def _check_integers(path, page_indices, kv_lens, starts):
    for name, array, rank in (
        ("page_indices", page_indices, 2),
        ("kv_lens", kv_lens, 1),
        ("starts", starts, 1),
    ):
        if array.dtype != np.int32 or array.ndim != rank:
            raise ValueError(
                f"{name} of {path} must be int32 with {rank} axes, but is {array.dtype}"
                f"{list(array.shape)}."
            )


def _check_table(path, page_indices, kv_lens, starts, page_size):
    """Returns the number of pages that the file's table speaks of."""
    shape = (len(kv_lens), -(-int(kv_lens.max(initial=0)) // page_size))
    if page_indices.shape != shape or np.any(kv_lens < 0):
        raise ValueError(
            f"The table of {path} is {list(page_indices.shape)}, but its lengths and a "
            f"page_size of {page_size} need {list(shape)}."
        )
    if starts.shape != kv_lens.shape or np.any(
        (starts < 0) | (starts > kv_lens) | (starts % page_size > 0)
    ):
        raise ValueError(
            f"The rows of {path} begin at {starts.tolist()}, but have the lengths "
            f"{kv_lens.tolist()} and pages of {page_size} tokens."
        )
    used = _used(starts, kv_lens, shape[1], page_size)
    pages = np.unique(page_indices[used])
    if not np.array_equal(pages, np.arange(len(pages))):
        raise ValueError(f"The table of {path} does not number its pages from 0.")
    # Rows share what they have in common from their beginning, so in one column.
    columns = np.broadcast_to(np.arange(shape[1]), shape)[used]
    if len(np.unique(np.stack([page_indices[used], columns]), axis=1).T) != len(pages):
        raise ValueError(f"The table of {path} has a page at two places of a sequence.")
    return len(pages)


def _replace_file(path, content):
    part = f"{os.fspath(path)}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)
