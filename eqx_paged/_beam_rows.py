"""Which rows the beams of a prompt have: forked from others', freed, and put in order."""

import jax.numpy as jnp


def rows_of(parents, lives):
    """A row for each beam, and whether it is its parent's.

    The first of a parent's beams stays in the parent's row; the others, and after them
    those that do not live, get the rows of parents without one.
    """
    num_beams = parents.shape[1]
    row = jnp.arange(num_beams, dtype=jnp.int32)
    siblings = (parents[:, :, None] == parents[:, None, :]) & lives[:, None, :]
    older = row[None, None, :] < row[None, :, None]
    stays = lives & ~jnp.any(siblings & older, axis=2)
    taken = jnp.any(stays[:, :, None] & (parents[:, :, None] == row[None, None]), axis=1)
    vacant = jnp.argsort(taken, axis=1, stable=True).astype(jnp.int32)
    rank = jnp.cumsum(~stays, axis=1, dtype=jnp.int32) - 1
    return jnp.where(stays, parents, take(vacant, jnp.maximum(rank, 0))), stays


def reorder(cache, plan, parents, rows, stays, lives):
    """Frees the rows that no beam continues, and forks beams into them."""
    first_row = jnp.arange(plan.num_prompts, dtype=jnp.int32)[:, None] * plan.num_beams
    src, dst = ((x + first_row).reshape(-1) for x in (parents, rows))
    leaves, moves = (x.reshape(-1) for x in (~stays, lives & ~stays))
    # The row of a prompt of length 0 is not ours.
    leaves &= jnp.repeat(plan.prompt_lens > 0, plan.num_beams)
    freed = jnp.zeros(cache.num_seqs, bool).at[dst].set(leaves)
    cache, _ = cache.free(freed).fork(src, dst, where=moves)
    return cache


def take(x, index):
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def put(x, index):
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros_like(x).at[rows, index].set(x)
