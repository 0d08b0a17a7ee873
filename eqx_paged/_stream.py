"""Generation in bursts: new tokens while there are more to come."""

from collections.abc import Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.stages
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from ._cache import PagedKVCache
from ._checks import check_int, INT32_MAX
from ._draft_model import DraftModel
from ._generate import (
    first_prompts,
    Generation,
    generation_of,
    made_in,
    Sampler,
    StopSequences,
)
from ._generation_checks import check_prompts_fit, is_traced
from ._generation_loop import advance, begin, end_prompts, open_prompts
from ._generation_plan import plan_of
from ._generation_state import Cache, Plan, State
from ._model import Model
from ._prompt_lookup import PromptLookup
from ._results import RESULTS
from .samplers._chain import greedy, Keys


class Stream(Iterator[dict[int, list[int]]]):
    """Prompts that are being continued: what [`eqx_paged.stream`][] returns.

    Each item is what one burst made: the new tokens of each prompt that has any. It may be
    empty while prompts are read.
    """

    def __init__(
        self, model: Model, plan: Plan, state: State, num_prompts: int, burst: int
    ):
        self._model = model
        self._plan = plan
        self._state: State | None = state
        self._num_prompts = num_prompts
        self._burst = burst
        self._open = np.asarray(plan.prompt_lens) > 0
        self._ended = np.zeros(plan.num_prompts, bool)
        self._cancelled = np.zeros(plan.num_prompts, bool)

    @property
    def finished(self) -> Bool[np.ndarray, " num_prompts"]:
        """Whether there is nothing more to come of each prompt."""
        return ~(self._open & ~self._ended)[: self._num_prompts]

    @property
    def num_free_pages(self) -> int:
        """How many pages of the pool are free after the last burst.

        **Raises:**

        `ValueError` over a cache without pages, after [`eqx_paged.Stream.finish`][], or if
        the last burst was interrupted.
        """
        cache = self._held().cache
        if not isinstance(cache, PagedKVCache):
            raise ValueError(f"A {type(cache).__name__} has no pages.")
        return int(cache.table.num_free_pages)

    def __next__(self) -> dict[int, list[int]]:
        """Runs a burst.

        **Returns:**

        The new tokens of each prompt that has any.

        **Raises:**

        `StopIteration` if all prompts are finished. `RuntimeError` if the run failed, after
        which [`eqx_paged.Stream.finish`][] returns what was made until then. `ValueError`
        if the last burst was interrupted, after which there is nothing to go on from.
        """
        if np.all(self.finished):
            raise StopIteration
        return self._run(self._burst)

    def stop(self, prompt: int) -> None:
        """Ends a prompt as a stop token would, before the next burst.

        **Arguments:**

        - `prompt`: which one. It may be finished already.

        **Raises:**

        `ValueError` if there is no such prompt.
        """
        if isinstance(prompt, bool) or not isinstance(prompt, (int, np.integer)):
            raise ValueError(f"prompt must be an int, but is {prompt!r}.")
        if not 0 <= prompt < self._num_prompts:
            raise ValueError(f"There is no prompt {prompt} of {self._num_prompts}.")
        self._ended[prompt] = True

    def cancel(self, prompt: int) -> None:
        """Ends a prompt and empties its row, so that its pages are free at the next burst.

        Its row is emptied of what was there before the prompt, too. Where prompts go in
        turn that is the same as `stop`, since their rows are freed in any case.

        **Arguments:**

        - `prompt`: which one. It may be finished already.

        **Raises:**

        `ValueError` if there is no such prompt.
        """
        self.stop(prompt)
        self._cancelled[prompt] = True

    def compile(self) -> jax.stages.Compiled:
        """Compiles the program of a burst ahead of the first one, and makes no token.

        **Returns:**

        The compiled program, which can tell what memory it takes.
        """
        state = self._held()
        compiled = _run_burst.lower(self._inputs(0), state).compile().compiled
        self._run(0)
        return compiled

    def finish(self) -> tuple[Generation, Cache]:
        """Ends the stream, and with it all prompts that are not finished, as they are.

        **Returns:**

        The same as [`eqx_paged.generate`][]: what was made, and the cache. `result` is that
        of the run.

        **Raises:**

        `ValueError` if it was called before, or the last burst was interrupted.
        """
        self._ended[:] = True
        self._run(0, throw=False)
        state, self._state = self._held(), None
        made, draft_cache = made_in(state)
        made = first_prompts(made, self._num_prompts)
        return generation_of(made, state.result, draft_cache), state.cache

    def _run(self, num_steps: int, throw: bool = True) -> dict[int, list[int]]:
        inputs = self._inputs(num_steps)
        # Used up: should the burst, or the wait for its report, be interrupted, there is
        # nothing to go on from.
        state, self._state = self._held(), None
        state, report = _run_burst(inputs, state)
        new, num_new, still_open, result = jax.tree.map(np.asarray, report)
        self._state, self._open = state, still_open
        self._cancelled[:] = False
        if result != RESULTS.successful:
            self._open = np.zeros_like(self._open)
            if throw:
                raise RuntimeError(RESULTS[result])
        prompts = np.flatnonzero(num_new).tolist()
        return {prompt: new[prompt, : num_new[prompt]].tolist() for prompt in prompts}

    def _held(self) -> State:
        if self._state is None:
            raise ValueError("The stream is finished, or its last burst was interrupted.")
        return self._state

    def _inputs(self, num_steps: int):
        masks = jnp.asarray(self._ended), jnp.asarray(self._cancelled)
        return (
            self._model,
            self._plan,
            masks,
            jnp.asarray(num_steps, jnp.int32),
            self._burst,
        )


def stream(
    model: Model,
    cache: Cache,
    prompts: Int[Array | np.ndarray, "num_prompts max_prompt_len"],
    prompt_lens: Int[Array | np.ndarray, " num_prompts"],
    *,
    max_new_tokens: int,
    burst: int = 8,
    limits: Int[Array | np.ndarray, " num_prompts"] | None = None,
    stop_tokens: Sequence[int] | Int[Array | np.ndarray, " num_stops"] = (),
    stop_sequences: StopSequences = (),
    sampler: Sampler = greedy,
    key: PRNGKeyArray | Keys | None = None,
    log_probs: int | None = None,
    draft: PromptLookup | DraftModel | None = None,
    window: int | None = None,
    prefill_chunk: int = 512,
    donate_cache: bool = False,
) -> Stream:
    """Continues prompts as [`eqx_paged.generate`][] does; gives their tokens on the way.

    ```python
    stream = eqx_paged.stream(model, cache, prompts, prompt_lens, max_new_tokens=256)
    for new in stream:
        for prompt, tokens in new.items():
            ...  # show them; if they are enough, stream.stop(prompt) or .cancel(prompt)
    generation, cache = stream.finish()
    ```

    The loop of `generate` runs for `burst` steps at a time, and what it holds, the cache
    above all, is donated from burst to burst. The tokens are those that `generate` makes.

    **Arguments:**

    - `burst`: how many steps to run between two looks; a step makes a token of each prompt
        that has been read and is in a row. Another number compiles again.
    - `donate_cache`: whether `cache`, and that of a draft, may be used up. If not, the
        stream begins with a copy, and it is as it was, however the stream ends.
    - All others: as in `generate`. A chosen token's log-probability is told by `finish`.

    **Returns:**

    The [`eqx_paged.Stream`][], before its first step.

    **Raises:**

    `ValueError` for arguments that do not fit together, for prompts that do not fit the
    cache, and under `jit`.
    """
    check_int(burst=burst, least=1, greatest=INT32_MAX)
    arguments = (model, cache, prompts, prompt_lens, limits, stop_tokens, stop_sequences)
    if is_traced((*arguments, sampler, key, draft)):
        raise ValueError("stream cannot be jitted: it gives tokens to the host.")
    plan, draft_cache = plan_of(
        cache,
        prompts,
        prompt_lens,
        max_new_tokens=max_new_tokens,
        limits=limits,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
        sampler=sampler,
        key=key,
        log_probs=log_probs,
        draft=draft,
        window=window,
        prefill_chunk=prefill_chunk,
    )
    check_prompts_fit(cache, prompts, prompt_lens, plan)
    if not donate_cache:
        cache, draft_cache = jax.tree.map(jnp.copy, (cache, draft_cache))
    state = _begin(plan, cache, draft_cache)
    return Stream(model, plan, state, prompts.shape[0], int(burst))


@eqx.filter_jit(donate="all-except-first")
def _begin(plan, cache, draft_cache):
    # That they fit has been checked.
    return begin(cache, plan, RESULTS.successful, draft_cache)


@eqx.filter_jit(donate="all-except-first")
def _run_burst(inputs, state):
    model, plan, (ended, cancelled), num_steps, burst = inputs
    state = end_prompts(state, plan, ended, cancelled)
    before = state.lengths
    state = advance(model, state, plan, state.step + num_steps)
    width = min(burst * plan.most_per_step, plan.max_new_tokens)
    column = before[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    rows = jnp.arange(plan.num_prompts, dtype=jnp.int32)[:, None]
    new = state.tokens.at[rows, column].get(mode="fill", fill_value=0)
    return state, (new, state.lengths - before, open_prompts(state), state.result)
