"""A donated step updates the cache in place: nothing as large as a layer is copied."""

import dataclasses
import inspect
import itertools
import re
import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from .helpers import ints, large_moves, stored_as_on
from .tpu import compile_for, large_copies, needs_libtpu, TOPOLOGIES


NUM_LAYERS, NUM_SEQS, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE = 2, 4, 8, 4, 16


def empty(num_pages, *, head_dim=64, dtype="float32", max_len=256):
    import eqx_paged

    return eqx_paged.PagedKVCache.empty(
        num_layers=NUM_LAYERS,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        num_seqs=NUM_SEQS,
        max_len=max_len,
        dtype=jnp.dtype(dtype),
    )


def step(cache, q_lens, num_tokens):
    import eqx_paged

    cache, batch, _ = cache.append(q_lens, num_tokens)
    layer = cache.layers[0]
    shape = (len(batch.positions), layer.head_dim)
    x = jnp.broadcast_to(batch.positions[:, None], shape).astype(layer.dtype) / 100
    q = jnp.repeat(x[:, None], NUM_HEADS, axis=1)
    layers = []
    for i, layer in enumerate(cache.layers):
        k = jnp.repeat(x[:, None] * (i + 1), NUM_KV_HEADS, axis=1)
        q, layer = eqx_paged.PagedAttention()(q, k, k, layer, batch)
        layers.append(layer)
    return dataclasses.replace(cache, layers=tuple(layers)), q


def assert_in_place(compiled, cache):
    layer = min(x.nbytes for x in jax.tree.leaves(cache.layers))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.num_bytes
    assert memory.temp_size_in_bytes < layer
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < layer
    assert large_moves(compiled, layer) == []


# 32 MiB a layer's keys in float32: far more than anything else in the program.
NUM_PAGES = 2048

every_storage = pytest.mark.parametrize(
    "dtype, head_dim", (("float32", 64), ("bfloat16", 64), ("bfloat16", 80))
)


@every_storage
@pytest.mark.parametrize("num_tokens", (None, 64))
def test_a_donated_step_copies_no_layer(dtype, head_dim, num_tokens):
    cache = empty(NUM_PAGES, dtype=dtype, head_dim=head_dim)
    jitted = jax.jit(step, donate_argnums=0, static_argnums=2)
    compiled = jitted.lower(cache, ints([1] * NUM_SEQS), num_tokens).compile()
    assert_in_place(compiled, cache)


@every_storage
def test_a_loop_of_steps_copies_no_layer(dtype, head_dim):
    cache = empty(NUM_PAGES, dtype=dtype, head_dim=head_dim)

    def loop(cache, num_steps):
        return jax.lax.fori_loop(
            0, num_steps, lambda _, c: step(c, ints([1] * NUM_SEQS), None)[0], cache
        )

    compiled = jax.jit(loop, donate_argnums=0).lower(cache, 5).compile()
    assert_in_place(compiled, cache)


class Echo(eqx.Module):
    """A model of attention alone."""

    def __call__(self, tokens, cache, batch):
        import eqx_paged

        layers = []
        first = cache.layers[0]
        x = tokens[:, None].astype(first.dtype) * jnp.ones((1, first.head_dim), first.dtype)
        for layer in cache.layers:
            q = jnp.repeat(x[:, None], NUM_HEADS, axis=1)
            k = q[:, :NUM_KV_HEADS]
            out, layer = eqx_paged.PagedAttention()(q, k, k, layer, batch)
            x = x + out[:, 0]
            layers.append(layer)
        return x, dataclasses.replace(cache, layers=tuple(layers))

    def unembed(self, hidden):
        return hidden


def generated(cache, prompts, prompt_lens):
    import eqx_paged

    return eqx_paged.generate(
        Echo(),
        cache,
        prompts,
        prompt_lens,
        max_new_tokens=8,
        prefill_chunk=32,
        throw=False,
    )


PROMPTS = jnp.ones((NUM_SEQS, 20), jnp.int32), ints([20, 3, 0, 7])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_generation_with_a_donated_cache_copies_no_layer(dtype):
    cache = empty(NUM_PAGES, dtype=dtype)
    compiled = jax.jit(generated, donate_argnums=0).lower(cache, *PROMPTS).compile()
    assert_in_place(compiled, cache)


@pytest.mark.parametrize(
    "drafts",
    (None, *(pytest.param(x, marks=pytest.mark.slow) for x in ("looked up", "by a model"))),
)
def test_a_burst_of_a_stream_copies_no_layer(drafts):
    import eqx_paged

    cache = empty(NUM_PAGES)
    options = dict(max_new_tokens=8, prefill_chunk=32, burst=4)
    if drafts == "looked up":
        options["draft"] = eqx_paged.PromptLookup(3)
    elif drafts == "by a model":
        options["draft"] = eqx_paged.DraftModel(Echo(), empty(NUM_PAGES), num_tokens=3)
    stream = eqx_paged.stream(Echo(), cache, *PROMPTS, donate_cache=True, **options)
    assert all(x.is_deleted() for x in jax.tree.leaves(cache.layers))
    assert_in_place(stream.compile(), cache)


@needs_libtpu
@pytest.mark.parametrize(
    "generation, head_dim",
    [
        pytest.param(*x, marks=() if x == ("7x", 64) else pytest.mark.slow)
        for x in itertools.product(TOPOLOGIES, (64, 80, 128))
    ],
)
def test_generation_on_a_tpu_copies_no_layer(generation, head_dim):
    with stored_as_on("tpu"):
        cache = jax.eval_shape(
            lambda: empty(NUM_PAGES, dtype="bfloat16", head_dim=head_dim)
        )
    args = (cache, *PROMPTS)
    compiled = compile_for(generation, generated, args, donate=(0,))
    # Prefill and decode, in two layers each: writing, and the kernels of attention.
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2 * (3 + 2)
    pool = cache.layers[0].k_pages
    assert not large_copies(compiled, least=pool.size)
    alias = compiled.memory_analysis().alias_size_in_bytes
    assert alias >= NUM_LAYERS * 2 * pool.size * pool.dtype.itemsize


def test_the_example_of_generate_donates_its_cache():
    """The program that its docstring shows."""
    import eqx_paged

    (example,) = re.findall(
        r"```python\n(.*?)```", inspect.getdoc(eqx_paged.generate), re.DOTALL
    )
    names = {"eqx": eqx, "eqx_paged": eqx_paged}
    exec(inspect.cleandoc(example), names)
    cache, prompts = empty(NUM_PAGES), jnp.ones((NUM_SEQS, 20), jnp.int32)
    inputs = Echo(), prompts, ints([20, 3, 0, 7])
    run = names["run"].lower(inputs, cache).compile()
    assert_in_place(run.compiled, cache)
    generation, after = run(inputs, cache)
    assert generation.lengths.tolist() == [64, 64, 0, 64]
    assert after.kv_lens.tolist() == [83, 66, 0, 70]
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))
    assert not any(x.is_deleted() for x in jax.tree.leaves(inputs))


def test_a_fork_and_a_free_copy_no_layer():
    def change(cache):
        cache, _ = cache.fork(ints([0, 0]), ints([1, 2]))
        cache = cache.free(jnp.array([True, False, False, False]))
        return cache.truncate(ints([3] * NUM_SEQS))

    cache = empty(NUM_PAGES)
    compiled = jax.jit(change, donate_argnums=0).lower(cache).compile()
    assert_in_place(compiled, cache)


def test_the_detector_sees_a_copy():
    # A cache that is not donated has to be copied.
    cache = empty(NUM_PAGES)
    layer = cache.layers[0].k_pages.nbytes
    compiled = jax.jit(step, static_argnums=2).lower(cache, ints([1] * 4), None).compile()
    assert large_moves(compiled, layer)
    # And so is one whose bfloat16 is converted.
    pages = jax.ShapeDtypeStruct((NUM_PAGES, 8, 16, 64), jnp.bfloat16)
    convert = jax.jit(lambda x: jnp.sin(x.astype(jnp.float32)))
    assert large_moves(convert.lower(pages).compile(), layer)


def times_of_steps(sizes_mib, dtype, *, num_rounds, steps_a_round):
    """Median seconds of a decode step for each size of the cache, taken in turns."""
    jitted = jax.jit(step, donate_argnums=0, static_argnums=2)
    q_lens = ints([1] * NUM_SEQS)
    caches, times = [], [[] for _ in sizes_mib]
    for mib in sizes_mib:
        cache = empty(8, dtype=dtype)
        num_pages = mib * 2**20 // (cache.num_bytes // 8)
        cache = empty(num_pages, dtype=dtype)
        assert abs(cache.num_bytes - mib * 2**20) < 2**20
        # Rows of some length, so that there is something to attend to.
        table, _ = cache.table.append(ints([60, 100, 3, 20]))
        cache = dataclasses.replace(cache, table=table)
        for _ in range(3):
            cache, out = jitted(cache, q_lens, None)
        jax.block_until_ready(out)
        caches.append(cache)
    for _ in range(num_rounds):
        for i, cache in enumerate(caches):
            begin = time.perf_counter()
            for _ in range(steps_a_round):
                cache, out = jitted(cache, q_lens, None)
            jax.block_until_ready((cache, out))
            times[i].append((time.perf_counter() - begin) / steps_a_round)
            caches[i] = cache
    return [statistics.median(x) for x in times]


def assert_flat(sizes_mib, dtype, *, within, **rounds):
    # Other work on the machine can only disturb: one quiet run of several is enough.
    ratios = []
    for _ in range(5):
        small, large = times_of_steps(sizes_mib, dtype, **rounds)
        ratios.append(large / small)
        if 1 - within <= ratios[-1] <= 1 + within:
            return
    raise AssertionError(f"the larger cache takes {ratios} times as long")


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_the_time_of_a_step_does_not_grow_with_the_cache(dtype):
    # A copy would cost sixteen times as much; half as much again is allowed for noise.
    assert_flat((8, 128), dtype, within=0.5, num_rounds=8, steps_a_round=5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_the_time_of_a_step_is_flat_from_64_mib_to_1_gib(dtype):
    assert_flat((64, 1024), dtype, within=0.2, num_rounds=15, steps_a_round=8)
