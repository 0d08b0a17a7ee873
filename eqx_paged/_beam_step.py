"""A step of beam search: what it carries, and how beams become others and hypotheses."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from ._beam_rows import put, reorder, rows_of, take
from ._cache import PagedKVCache
from ._results import RESULTS


class Hypotheses(eqx.Module):
    """What [`eqx_paged.beam_search`][] found, the best of each prompt first.

    - `tokens`: of each hypothesis, a stop token included; 0 past its length.
    - `lengths`: how many there are; 0 where there is no hypothesis.
    - `scores`: the sum of the tokens' log-probabilities, divided by
        `length ** length_penalty`; `-inf` where there is no hypothesis.
    - `result`: `successful`, or what ended the search early. What was found until then is
        kept.
    """

    tokens: Int32[Array, "num_prompts num_beams max_new_tokens"]
    lengths: Int32[Array, "num_prompts num_beams"]
    scores: Float32[Array, "num_prompts num_beams"]
    result: RESULTS


class SearchPlan(eqx.Module):
    """What a search is to do: the arguments of `beam_search`."""

    prompts: Int32[Array, "num_prompts max_prompt_len"]
    prompt_lens: Int32[Array, " num_prompts"]
    stop_tokens: Int32[Array, " num_stops"]
    length_penalty: Float32[Array, ""]
    stops_early: Bool[Array, ""]
    never_stops_early: Bool[Array, ""]
    num_beams: int = eqx.field(static=True)
    max_new_tokens: int = eqx.field(static=True)
    prefill_chunk: int = eqx.field(static=True)

    @property
    def num_prompts(self) -> int:
        return self.prompts.shape[0]

    @property
    def num_rows(self) -> int:
        return self.num_prompts * self.num_beams

    @property
    def num_candidates(self) -> int:
        """Enough that `num_beams` of them do not end in a stop token."""
        return max(2, 1 + self.stop_tokens.shape[0]) * self.num_beams


class Beams(eqx.Module):
    """The beams of each prompt, in the order of their rows.

    - `tokens`: what each has made, `SearchState.length` tokens.
    - `last`: the token that each has yet to read.
    - `sums`: of the log-probabilities; `-inf` where there is no beam.
    """

    tokens: Int32[Array, "num_prompts num_beams max_new_tokens"]
    last: Int32[Array, "num_prompts num_beams"]
    sums: Float32[Array, "num_prompts num_beams"]


class SearchState(eqx.Module):
    """What the loop carries; a prompt that is not `open` is done."""

    cache: PagedKVCache
    beams: Beams
    found: Hypotheses
    open: Bool[Array, " num_prompts"]
    length: Int32[Array, ""]


def begin(cache, plan, result):
    shape = (plan.num_prompts, plan.num_beams)
    tokens = jnp.zeros((*shape, plan.max_new_tokens), jnp.int32)
    none = jnp.full(shape, -jnp.inf, jnp.float32)
    exists = (plan.prompt_lens > 0) & (result == RESULTS.successful)
    last = plan.prompt_lens - 1
    last = jnp.take_along_axis(plan.prompts, jnp.maximum(last, 0)[:, None], axis=1)
    return SearchState(
        cache=cache,
        # One beam, from which the others are forked.
        beams=Beams(
            tokens=tokens,
            last=jnp.broadcast_to(last, shape),
            sums=none.at[:, 0].set(jnp.where(exists, 0.0, -jnp.inf)),
        ),
        found=Hypotheses(tokens, jnp.zeros(shape, jnp.int32), none, result),
        open=exists,
        length=jnp.array(0, jnp.int32),
    )


class Candidates(eqx.Module):
    """Continuations by one token, the most probable first."""

    sums: Float32[Array, "num_prompts num_candidates"]
    tokens: Int32[Array, "num_prompts num_candidates max_new_tokens"]
    last: Int32[Array, "num_prompts num_candidates"]
    parents: Int32[Array, "num_prompts num_candidates"]
    ends: Bool[Array, "num_prompts num_candidates"]


def step(model, state, plan):
    logits, cache, result = _read(model, state, plan)
    # After a failure nothing is probable, and all rows are freed.
    goes_on = state.open & (result == RESULTS.successful)
    candidates = _continue(state, plan, logits, goes_on)
    length = state.length + 1
    found = _keep_the_best(state.found, candidates, length, plan)
    sums, chosen = jax.lax.top_k(
        jnp.where(candidates.ends, -jnp.inf, candidates.sums), plan.num_beams
    )
    still_open = goes_on & _can_improve(found, sums, length, plan)
    sums = jnp.where(still_open[:, None], sums, -jnp.inf)
    parents = take(candidates.parents, chosen)
    rows, stays = rows_of(parents, sums > -jnp.inf)
    beams = Beams(take(candidates.tokens, chosen), take(candidates.last, chosen), sums)
    return SearchState(
        cache=reorder(cache, plan, parents, rows, stays, sums > -jnp.inf),
        beams=jax.tree.map(lambda x: put(x, rows), beams),
        found=dataclasses.replace(found, result=result),
        open=still_open,
        length=length,
    )


def _read(model, state, plan):
    """The logits of each beam's next token."""
    beams, unused = state.beams, state.cache.num_seqs - plan.num_rows
    lives = jnp.pad((beams.sums > -jnp.inf).reshape(-1), (0, unused))
    tokens = jnp.where(lives, jnp.pad(beams.last.reshape(-1), (0, unused)), 0)
    cache, batch, result = state.cache.append(lives.astype(jnp.int32))
    hidden, cache = model(tokens, cache, batch)
    logits = model.unembed(hidden[: plan.num_rows])
    return logits.reshape(*beams.sums.shape, -1), cache, result


def _continue(state, plan, logits, goes_on):
    beams = state.beams
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    sums = beams.sums[:, :, None] + log_probs
    # An idle row's logits may be anything.
    lives = (beams.sums > -jnp.inf) & goes_on[:, None]
    sums = jnp.where(lives[:, :, None], sums, -jnp.inf)
    vocab_size = logits.shape[-1]
    sums = sums.reshape(plan.num_prompts, -1)
    num_candidates = min(plan.num_candidates, sums.shape[1])
    sums, which = jax.lax.top_k(sums, num_candidates)
    parents, last = (x.astype(jnp.int32) for x in jnp.divmod(which, vocab_size))
    tokens = take(beams.tokens, parents).at[:, :, state.length].set(last)
    stops = jnp.any(last[:, :, None] == plan.stop_tokens[None, None], axis=2)
    ends = stops | (state.length + 1 == plan.max_new_tokens)
    return Candidates(sums, tokens, last, parents, ends)


def _keep_the_best(found, candidates, length, plan):
    """The hypotheses, with those of the first `num_beams` candidates that end."""
    first = jax.tree.map(lambda x: x[:, : plan.num_beams], candidates)
    scores = first.sums / _penalty(length, plan)
    scores = jnp.where(first.ends, scores, -jnp.inf)
    lengths = jnp.where(scores > -jnp.inf, length, 0)
    tokens = jnp.where((scores > -jnp.inf)[:, :, None], first.tokens, 0)

    def joined(old, new):
        return jnp.concatenate([old, new], axis=1)

    scores, best = jax.lax.top_k(joined(found.scores, scores), plan.num_beams)
    return Hypotheses(
        tokens=take(joined(found.tokens, tokens), best),
        lengths=take(joined(found.lengths, lengths), best),
        scores=scores,
        result=found.result,
    )


def _can_improve(found, sums, length, plan):
    """Whether a prompt's beams may yet give a better hypothesis than its worst."""
    worst = jnp.min(found.scores, axis=1)  # -inf while there are too few
    longest = plan.never_stops_early & (plan.length_penalty > 0)
    at = jnp.where(longest, plan.max_new_tokens, length)
    best = jnp.max(sums, axis=1) / _penalty(at, plan)
    return (best > worst) & ~(plan.stops_early & (worst > -jnp.inf))


def _penalty(length, plan):
    return length.astype(jnp.float32) ** plan.length_penalty
