"""Times calls on the device: many in one compiled program, each fed by the one before."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from ._bench_gpu_clock import Effort, timed, Timing


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Calls that are ready to be timed.

    - `step`: `(q, pool, shared) -> q`; what it gives is the next call's queries, so that no
        call can be left out.
    - `pools`: read in turn. Arguments, not constants of the program, as `shared` is.
    - `unpacked`: makes what it gives `[num_seqs, q_len, num_heads, head_dim]`, or the same
        in fewer axes.
    - `in_place`: whether what one run gives is given up to the next, so that large
        arguments are not copied. `q` is gone then.
    """

    step: Callable[[Any, Any, Any], Any]
    q: Any
    pools: tuple
    shared: Any = ()
    unpacked: Callable[[jax.Array], jax.Array] = lambda out: out
    in_place: bool = False

    def first(self) -> jax.Array:
        """What the first call gives."""
        return self.unpacked(jax.jit(self.step)(self.q, self.pools[0], self.shared))


def time_calls(prepared: Prepared, effort: Effort) -> Timing:
    """Times `prepared`. What depends on lengths alone may be computed once for all calls,
    as it is for all layers of a step."""
    turns = -(-effort.num_calls // len(prepared.pools))

    @functools.partial(jax.jit, donate_argnums=(0,) if prepared.in_place else ())
    def run(q, pools, shared):
        def turn(_, q):
            for pool in pools:
                q = prepared.step(q, pool, shared)
            return q

        return jax.lax.fori_loop(0, turns, turn, q)

    q = prepared.q

    def runs(num_runs: int) -> None:
        nonlocal q
        out = q
        for _ in range(num_runs):  # launched while the one before still runs
            out = run(out, prepared.pools, prepared.shared)
        q = jax.block_until_ready(out) if prepared.in_place else q
        jax.block_until_ready(out)

    return timed(runs, turns * len(prepared.pools), effort)
