"""Rows of a paged cache in a file. Runs on the host.

The file is safetensors: `page_indices` and `kv_lens` of the rows, where pages are counted
from 0 in the file, and `layers.{i}.k`, `layers.{i}.v`, each `[pages, num_kv_heads,
page_size, head_dim]` in the dtype of the cache. Slots past a sequence's end are 0.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ._kv_pages import KVPages
from ._page_table import PageTable
from ._results import RESULTS
from .kernels._pages import lanes_per_token, value_dtype


FORMAT = "eqx_paged rows 1"


class SavedRows(NamedTuple):
    """What a file holds, with the pages as the cache that reads it stores them."""

    page_indices: np.ndarray
    kv_lens: np.ndarray
    layers: tuple[KVPages, ...]


def write(
    path: str | os.PathLike,
    layers: tuple[KVPages, ...],
    table: PageTable,
    rows: Sequence[int],
) -> None:
    """Writes rows, replacing the file only when the new one is complete."""
    chosen = _check_rows(rows, table.num_seqs)
    kv_lens = np.asarray(table.kv_lens)[chosen]
    num_columns = -(-int(kv_lens.max(initial=0)) // table.page_size)
    used = np.arange(num_columns) * table.page_size < kv_lens[:, None]
    entries = np.asarray(table.page_indices)[chosen, :num_columns]
    pages, numbers = np.unique(entries[used], return_inverse=True)
    page_indices = np.zeros(used.shape, np.int32)
    page_indices[used] = numbers.reshape(-1)

    live = np.zeros(len(pages), np.int64)
    np.maximum.at(live, page_indices[used], _live_slots(kv_lens, used, table.page_size))
    tensors = {"page_indices": page_indices, "kv_lens": kv_lens.astype(np.int32)}
    for i, layer in enumerate(layers):
        tensors[f"layers.{i}.k"] = _to_file(layer.k_pages[pages], layer, live)
        tensors[f"layers.{i}.v"] = _to_file(layer.v_pages[pages], layer, live)
    metadata = {"format": FORMAT, "page_size": str(table.page_size)}
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
    if metadata.get("page_size") != str(table.page_size):
        raise ValueError(
            f"{path} has pages of {metadata.get('page_size')} tokens, but this cache has "
            f"pages of {table.page_size}."
        )
    _check_names(path, tensors, len(layers))
    page_indices, kv_lens = tensors["page_indices"], tensors["kv_lens"]
    _check_integers(path, page_indices, kv_lens)
    if num_rows != len(kv_lens):
        raise ValueError(
            f"{path} holds {len(kv_lens)} rows, but {num_rows} rows were given to load "
            "them into."
        )
    num_pages = _check_table(path, page_indices, kv_lens, table.page_size)
    return SavedRows(
        page_indices=page_indices,
        kv_lens=kv_lens,
        layers=tuple(
            KVPages(
                _from_file(path, tensors, f"layers.{i}.k", layer, num_pages),
                _from_file(path, tensors, f"layers.{i}.v", layer, num_pages),
                layer.head_dim,
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
    used = np.arange(num_columns) * table.page_size < saved.kv_lens[:, None]
    entries = np.zeros((len(targets), table.pages_per_seq), np.int32)
    entries[:, :num_columns][used] = pages[saved.page_indices[used]]
    counts = np.bincount(saved.page_indices[used], minlength=num_new)
    table = PageTable(
        page_indices=table.page_indices.at[targets].set(entries),
        kv_lens=table.kv_lens.at[targets].set(saved.kv_lens),
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


def _live_slots(kv_lens, used, page_size):
    first_slots = np.arange(used.shape[1]) * page_size
    return np.minimum(kv_lens[:, None] - first_slots, page_size)[used]


def _to_file(pages, layer, live):
    # Slots past the end may hold what another sequence left there.
    stored = np.asarray(pages).view(value_dtype(pages.dtype))
    values = stored.reshape(_shape_of_tokens(len(pages), layer))[..., : layer.head_dim]
    dead = np.arange(layer.page_size) >= live[:, None]
    return np.where(dead[:, None, :, None], np.zeros((), values.dtype), values)


def _from_file(path, tensors, name, layer, num_pages):
    values = tensors[name]
    stored = layer.k_pages if name.endswith("k") else layer.v_pages
    dtype = value_dtype(stored.dtype)
    shape = _shape_of_tokens(num_pages, layer)
    plain = (*shape[:3], layer.head_dim)
    if values.shape != plain or values.dtype != dtype:
        raise ValueError(
            f"{name} of {path} is {values.dtype}{list(values.shape)}, but this cache needs "
            f"{dtype}{list(plain)}."
        )
    pages = np.zeros(shape, dtype)
    pages[..., : layer.head_dim] = values
    pages = pages.reshape(num_pages, *stored.shape[1:])
    return jax.device_put(pages.view(np.dtype(stored.dtype)))


def _shape_of_tokens(num_pages, layer):
    lanes = lanes_per_token(layer.k_pages.shape[3], layer.head_dim)
    return num_pages, layer.num_kv_heads, layer.page_size, lanes


def _check_names(path, tensors, num_layers):
    wanted = {"page_indices", "kv_lens"}
    wanted |= {f"layers.{i}.{x}" for i in range(num_layers) for x in "kv"}
    if tensors.keys() != wanted:
        raise ValueError(
            f"{path} has tensors {sorted(tensors.keys() - wanted)} that a cache of "
            f"{num_layers} layers has not, and lacks {sorted(wanted - tensors.keys())}."
        )


def _check_integers(path, page_indices, kv_lens):
    for name, array, rank in (("page_indices", page_indices, 2), ("kv_lens", kv_lens, 1)):
        if array.dtype != np.int32 or array.ndim != rank:
            raise ValueError(
                f"{name} of {path} must be int32 with {rank} axes, but is {array.dtype}"
                f"{list(array.shape)}."
            )


def _check_table(path, page_indices, kv_lens, page_size):
    """Returns the number of pages that the file's table speaks of."""
    shape = (len(kv_lens), -(-int(kv_lens.max(initial=0)) // page_size))
    if page_indices.shape != shape or np.any(kv_lens < 0):
        raise ValueError(
            f"The table of {path} is {list(page_indices.shape)}, but its lengths and a "
            f"page_size of {page_size} need {list(shape)}."
        )
    used = np.arange(shape[1]) * page_size < kv_lens[:, None]
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
