"""How many pages prompts need: one rule, for arrays of NumPy before any work and for those
of JAX within the program."""

import jax
import jax.numpy as jnp
import numpy as np


def num_pages(length, page_size):
    """Of so many tokens."""
    return -(-length // page_size)


def most_pages(plan, page_size, num_new):
    """The most pages that a row has at a time: of the tokens that are seen, and of the
    `num_new` that a step adds. None if that goes with its length."""
    if plan.window is None:
        return None
    # What is seen may begin with the last token of a page.
    return 1 + num_pages(plan.window + num_new - 2, page_size)


def pages_at_once(length, page_size, most):
    """The most pages that an empty row takes at a time, to read so many tokens."""
    pages = num_pages(length, page_size)
    return pages if most is None else _namespace(pages).minimum(pages, most)


def whole_lens(plan, prompt_lens, limits):
    """The most tokens that are read of each prompt and of what is made of it: all but the
    last one made."""
    xp = _namespace(prompt_lens)
    most = plan.max_new_tokens
    most = most if limits is None else xp.minimum(limits, most)
    return xp.where(prompt_lens > 0, prompt_lens + xp.maximum(most - 1, 0), 0)


def pages_before_work(table, plan, prompt_lens, limits):
    """The pages that each prompt needs: all at once, or one after the other, in turn."""
    size = table.page_size
    most = most_pages(plan, size, plan.num_tokens)
    if not plan.in_turn:
        return pages_to_read(table, prompt_lens, most, num_pages(plan.num_tokens, size))
    if most is None:
        return num_pages(prompt_lens, size)
    # A prompt that is put back is read again with what was made of it.
    lens = whole_lens(plan, prompt_lens, limits)
    lens = _namespace(lens).minimum(lens, table.max_len)
    return pages_at_once(lens, size, most)


def pages_to_read(table, q_lens, most=None, of_step=0):
    """The free pages that each row of a table takes, to read so many more tokens.

    With `most`, a row drops what is not seen any more, so that it has at most `most` pages
    after its first step, of `of_step` pages.
    """
    size = table.page_size
    copies = num_copies(table, q_lens)
    new = num_pages(table.kv_lens + q_lens, size) - num_pages(table.kv_lens, size) + copies
    if most is None:
        return new
    xp = _namespace(q_lens)
    # What it drops is free again only if it is its own.
    return xp.minimum(new, xp.maximum(most - _num_own(table, xp), of_step + copies))


def num_copies(table, q_lens):
    """How many pages each row copies before it writes: the one it writes to, if it shares
    it. Where all who share one write, the last of them keeps it."""
    xp = _namespace(q_lens)
    writes = (q_lens > 0) & (table.kv_lens % table.page_size > 0)
    rows = xp.arange(table.num_seqs, dtype=np.int32)
    tails = table.page_indices[rows, xp.maximum(table.kv_lens - 1, 0) // table.page_size]
    same = writes[:, None] & writes[None] & (tails[:, None] == tails[None])
    num_writers = xp.sum(same, axis=1, dtype=np.int32)
    is_last = ~xp.any(same & (rows[:, None] < rows[None]), axis=1)
    keeps = is_last & (num_writers == table.ref_counts[tails])
    return (writes & ~keeps).astype(np.int32)


def _num_own(table, xp):
    """The pages of each row that nobody else holds."""
    first_slots = xp.arange(table.pages_per_seq, dtype=np.int32)[None] * table.page_size
    held = (first_slots >= table.starts[:, None]) & (first_slots < table.kv_lens[:, None])
    own = held & (table.ref_counts[table.page_indices] == 1)
    return xp.sum(own, axis=1, dtype=np.int32)


def _namespace(array):
    return jnp if isinstance(array, jax.Array) else np
