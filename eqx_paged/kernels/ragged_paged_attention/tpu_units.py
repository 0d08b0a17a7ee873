"""What the mixed kernel for the TPU computes at once: units of rows of an item's queries,
against some keys."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from .._tpu import iota
from .._tpu_attend import add_softmax, dot, HIDDEN, scale, within
from .tpu_plan import ALIGNED_ROWS, Plan


class Item(NamedTuple):
    """A row's tokens in a tile, as scalars."""

    index: Any
    base: Any  # position of the tile's first token, if it were of the row
    begin: Any  # the row's first token in the tile
    end: Any
    seen_from: Any  # positions that one of them sees
    seen_to: Any
    first_page: Any
    num_pages: Any
    num_blocks: Any
    few_from: Any  # the first of the few rows of queries that hold all its tokens
    is_few: Any  # if these exist


class Seen(NamedTuple):
    """Which keys a unit of rows sees."""

    plan: Plan
    item: Item
    window: int | None
    begin: Any  # position of the first key

    def of_scores(self, unit, shape):
        """A query of `row` is `row // group` tokens after the first of the tile."""
        plan, item = self.plan, self.item
        row = unit.first + iota(shape, 0)
        token = self.begin + iota(shape, 1) * plan.streams + unit.stream - item.base
        seen = row >= token * plan.group
        if self.window is not None:
            seen &= row < (token + self.window) * plan.group
        return seen

    def of_keys(self, shape):
        """Seen by some query."""
        plan, item = self.plan, self.item
        token = self.begin + iota(shape, 0) * plan.streams
        if plan.streams > 1:
            token += iota(shape, 1) // plan.head_dim
        return within(token, (item.seen_from, item.seen_to))


class Unit(NamedTuple):
    """Rows of queries of a head, in one stream."""

    head: Any
    stream: int
    first: Any
    rows: int

    @property
    def place(self):
        return self.head, self.stream, pl.ds(self.first, self.rows)


def units_of(plan, turn):
    """All rows of some heads: lists of those that are computed at once."""
    for stream in range(plan.streams):
        for first in range(0, plan.stream_rows, plan.unit_rows):
            yield [
                Unit(turn * plan.heads + i, stream, first, plan.unit_rows)
                for i in range(plan.heads)
            ]


def few_units(first, plan, turn):
    """The few rows, from `first` on, that an item's tokens have, if these are few."""
    first = pl.multiple_of(first, ALIGNED_ROWS)
    yield [
        Unit(turn * plan.heads + i, stream, first, plan.few_rows)
        for i in range(plan.heads)
        for stream in range(plan.streams)
    ]


def attend(plan, cap, q_ref, kv_refs, state, units, pages, seen=None):
    """Adds some keys to the state of some heads' rows of queries: first all scores, then
    each head's softmax and values."""
    k_ref, v_ref = kv_refs
    m_ref, l_ref, acc_ref = state
    dtype = q_ref.dtype

    def keys(ref, head):
        return ref[pages, head].reshape(-1, plan.lanes).astype(dtype)

    all_scores = []
    for unit in units:
        k = keys(k_ref, unit.head)
        if seen is not None and plan.streams > 1:
            # A token that was written may share its row of lanes with one that was not.
            k = jnp.where(seen.of_keys(k.shape), k, jnp.zeros_like(k))
        scores = dot(q_ref[unit.place], k, 1)
        if cap is not None:
            scores = cap * jnp.tanh(scores)
        if seen is not None:
            scores = jnp.where(seen.of_scores(unit, scores.shape), scores, HIDDEN)
        all_scores.append(scores)
    for unit, scores in zip(units, all_scores, strict=True):
        at, v = unit.place, keys(v_ref, unit.head)
        if seen is not None:
            v = jnp.where(seen.of_keys(v.shape), v, jnp.zeros_like(v))
        p, m_ref[at], l_ref[at], alpha = add_softmax(scores, m_ref[at], l_ref[at], dtype)
        acc_ref[at] = scale(acc_ref[at], alpha) + dot(p, v, 0)
