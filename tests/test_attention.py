import dataclasses
import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import oracle
from .helpers import (
    assert_close,
    assert_trees_identical,
    entry,
    fails_naming,
    head_values,
    ints,
    layer_pools,
    normal,
    quick_jit,
    rng_of,
    stacked,
    stored_as_on,
    told,
)


NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16

# A conversation of three rows: whole prompts, chunks, decode steps, idle rows, over several
# pages. None is a decode step.
STEPS = (
    ((5, 0, 17), 24),
    ((9, 7, 0), 24),
    ((1, 1, 1), None),
    ((0, 1, 1), None),
    ((1, 20, 2), 24),
    ((1, 0, 1), None),
    ((0, 0, 0), None),
    ((0, 0, 0), 24),
    ((1, 1, 1), 24),
)


def cache_of(kind, dtype, max_len=40):
    import eqx_paged

    sizes = dict(
        num_layers=1,
        num_seqs=3,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_len=max_len,
        dtype=jnp.dtype(dtype),
    )
    if kind == "paged":
        cache = eqx_paged.PagedKVCache.empty(
            **sizes, num_pages=3 * max_len // 8, page_size=8
        )
    else:
        cache = eqx_paged.RaggedKVCache.empty(**sizes)
    # What was never written must not matter.
    return eqx.tree_at(
        lambda c: c.layers,
        cache,
        jax.tree.map(
            lambda x: jnp.full_like(x, 0x7FC0 if x.dtype == jnp.uint16 else jnp.nan),
            cache.layers,
        ),
    )


def layer_of(kind, options):
    import eqx_paged

    attention = dict(paged=eqx_paged.PagedAttention, ragged=eqx_paged.RaggedAttention)
    return attention[kind](**options)


@ft.partial(quick_jit, static_argnames="num_tokens")
def step(attention, cache, q_lens, q, k, v, num_tokens):
    cache, batch, result = cache.append(q_lens, num_tokens)
    out, layer = attention(q, k, v, cache.layers[0], batch)
    return out, dataclasses.replace(cache, layers=(layer,)), batch, result


OPTIONS = {
    "plain": {},
    "scale, soft cap": dict(sm_scale=0.5, soft_cap=2.0),
    "window, sinks": dict(sliding_window=6, sinks=jnp.asarray(head_values(NUM_HEADS))),
    "xla": dict(implementation="xla"),
}


def check_steps(key, steps, cache, attention, dtype="float32", **options):
    """That steps of `q_lens` and padded numbers of tokens equal dense attention."""
    rng = rng_of(key)
    past = [(np.zeros((0, NUM_KV_HEADS, HEAD_DIM)),) * 2 for _ in range(3)]
    for q_lens, num_tokens in steps:
        total = 3 if num_tokens is None else num_tokens
        q = normal(rng, (total, NUM_HEADS, HEAD_DIM), dtype)
        k, v = (normal(rng, (total, NUM_KV_HEADS, HEAD_DIM), dtype) for _ in range(2))
        arrays = (jnp.asarray(x) for x in (q, k, v))
        out, cache, batch, result = step(
            attention, cache, ints(q_lens), *arrays, num_tokens
        )
        assert told(result) == "successful"
        assert out.dtype == jnp.dtype(dtype)
        wanted, first = np.zeros(q.shape), 0
        for i, n in enumerate(q_lens):
            first = i if num_tokens is None else first
            tokens = slice(first, first + n)
            past[i] = tuple(np.concatenate([a, b[tokens]]) for a, b in zip(past[i], (k, v)))
            wanted[tokens] = oracle.attention(q[tokens], *past[i], **options)[0]
            first += n
        assert_close(out, wanted, dtype)


@pytest.mark.parametrize("kind", ("paged", "ragged"))
@pytest.mark.parametrize(
    "options, dtype",
    [*((name, "float32") for name in OPTIONS if name != "xla"), ("xla", "bfloat16")],
)
def test_a_layer_over_many_steps_equals_dense_attention(getkey, kind, options, dtype):
    options = OPTIONS[options]
    cache, attention = cache_of(kind, dtype), layer_of(kind, options)
    options = {n: x for n, x in options.items() if n != "implementation"}
    check_steps(getkey(), STEPS, cache, attention, dtype, **options)


@pytest.mark.parametrize("kind", ("paged", "ragged"))
@pytest.mark.parametrize("options", ({}, dict(sliding_window=100)), ids=("all", "window"))
def test_long_rows_beside_short_ones(getkey, kind, options):
    # XLA works off 128 queries at a time; the last ones of a row 32 at a time if they are
    # no more than 64, and so all of a row of no more than 256 keys. With 64 tokens in all,
    # 64 at a time, or 32 if they are no more than 32.
    steps = (
        *(((256, 65, 129), 450), ((1, 191, 192), 400), ((64, 65, 193), 352)),
        *(((33, 3, 1), 64), ((1, 32, 31), 64)),
    )
    cache = cache_of(kind, "float32", max_len=600)
    check_steps(getkey(), steps, cache, layer_of(kind, options), **options)


def test_positions_before_starts_are_not_attended(getkey):
    rng = rng_of(getkey())
    cache = dataclasses.replace(cache_of("ragged", "float32"), starts=ints((0, 3, 9)))
    attention = layer_of("ragged", {})
    past = [(np.zeros((0, NUM_KV_HEADS, HEAD_DIM)),) * 2 for _ in range(3)]
    for q_lens, num_tokens in (((5, 6, 17), 28), ((1, 1, 1), None)):
        total = sum(q_lens)
        q = normal(rng, (total, NUM_HEADS, HEAD_DIM))
        k, v = (normal(rng, (total, NUM_KV_HEADS, HEAD_DIM)) for _ in range(2))
        arrays = (jnp.asarray(x) for x in (q, k, v))
        out, cache, _, _ = step(attention, cache, ints(q_lens), *arrays, num_tokens)
        first = 0
        for i, (n, start) in enumerate(zip(q_lens, (0, 3, 9))):
            tokens = slice(first, first + n)
            past[i] = tuple(np.concatenate([a, b[tokens]]) for a, b in zip(past[i], (k, v)))
            wanted = oracle.attention(q[tokens], *past[i], start=start)[0]
            assert_close(np.asarray(out)[tokens], wanted)
            first += n


def test_forked_rows_go_their_own_ways(getkey):
    rng = rng_of(getkey())
    cache, attention = cache_of("paged", "float32"), layer_of("paged", {})
    shape = (24, NUM_HEADS, HEAD_DIM), (24, NUM_KV_HEADS, HEAD_DIM)
    q, k, v = (normal(rng, shape[i > 0]) for i in range(3))
    arrays = [jnp.asarray(x) for x in (q, k, v)]
    _, cache, _, _ = step(attention, cache, ints((12, 0, 0)), *arrays, 24)
    cache, result = cache.fork(ints((0, 0)), ints((1, 2)))
    assert told(result) == "successful"
    past = [(k[:12], v[:12])] * 3
    q, k, v = (normal(rng, (3, *s[1:])) for s in (shape[0], shape[1], shape[1]))
    arrays = [jnp.asarray(x) for x in (q, k, v)]
    out, cache, _, _ = step(attention, cache, ints((1, 1, 1)), *arrays, None)
    for i in range(3):
        keys, values = (np.concatenate([a, b[i : i + 1]]) for a, b in zip(past[i], (k, v)))
        wanted = oracle.attention(q[i : i + 1], keys, values)[0]
        assert_close(np.asarray(out)[i : i + 1], wanted)


@pytest.mark.parametrize("head_dim", (80, pytest.param(96, marks=pytest.mark.slow)))
def test_pages_rounded_up_as_on_a_tpu_give_the_same_numbers(getkey, head_dim):
    import eqx_paged

    sizes = dict(num_layers=1, num_pages=9, page_size=8, num_kv_heads=2, head_dim=head_dim)
    sizes |= dict(num_seqs=3, max_len=24)
    caches = [eqx_paged.PagedKVCache.empty(**sizes)]
    with stored_as_on("tpu"):
        caches.append(eqx_paged.PagedKVCache.empty(**sizes))
    assert [c.layers[0].k_pages.shape[3] for c in caches] == [head_dim, 128]
    rng, attention = rng_of(getkey()), layer_of("paged", {})
    # Rows that share a page which is not full, and then both write to it.
    for q_lens, num_tokens in (((12, 0, 3), 16), ((1, 1, 1), None)):
        heads = NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS
        qkv = [jnp.asarray(normal(rng, (num_tokens or 3, n, head_dim))) for n in heads]
        outs = []
        for i, cache in enumerate(caches):
            out, cache, *_ = step(attention, cache, ints(q_lens), *qkv, num_tokens)
            caches[i] = cache.fork(0, 1)[0] if num_tokens else cache
            outs.append(out)
        assert_close(outs[1], outs[0])
    assert caches[1].kv_lens.tolist() == [13, 13, 4]
    for plain, rounded in zip(*map(layer_pools, caches)):
        np.testing.assert_array_equal(rounded, plain)


@pytest.mark.parametrize("kind", ("paged", "ragged"))
def test_a_batch_of_caches_attends_as_each_does_alone(getkey, kind):
    rng = rng_of(getkey())
    attention = layer_of(kind, {})

    def tokens(*shape):
        heads = NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS
        return [jnp.asarray(normal(rng, (*shape, n, HEAD_DIM))) for n in heads]

    caches = []
    for q_lens in ((5, 0, 17), (0, 9, 0), (24, 0, 0)):
        _, cache, _, _ = step(
            attention, cache_of(kind, "float32"), ints(q_lens), *tokens(24), 24
        )
        caches.append(cache)
    q_lens = ints([(1, 1, 1), (0, 1, 0), (2, 0, 0)])  # the last of which is refused
    qkv = tokens(3, 3)
    decode = quick_jit(jax.vmap(lambda *args: step.__wrapped__(attention, *args, None)))
    outs, *others = decode(stacked(caches), q_lens, *qkv)
    results = []
    for i, cache in enumerate(caches):
        out, *wanted = step(attention, cache, q_lens[i], *(x[i] for x in qkv), None)
        assert_close(outs[i], out)
        assert_trees_identical(entry(others, i), wanted)
        results.append(told(wanted[-1]))
    assert results == ["successful", "successful", "too_many_tokens"]


@pytest.mark.parametrize("kind, num_tokens", (("paged", None), ("ragged", 24)))
def test_64_bit_mode_changes_nothing(getkey, kind, num_tokens):
    rng = rng_of(getkey())
    cache, attention = cache_of(kind, "float32"), layer_of(kind, OPTIONS["window, sinks"])
    heads = NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS
    qkv = [jnp.asarray(normal(rng, (num_tokens or 3, n, HEAD_DIM))) for n in heads]
    args = (attention, cache, ints((1, 0, 1)), *qkv, num_tokens)
    out, *wanted = step(*args)
    with jax.enable_x64(True):
        out_64, *wanted_64 = step(*args)
    assert out_64.dtype == jnp.float32
    assert_close(out_64, out)
    assert_trees_identical(wanted_64, wanted)


@pytest.mark.parametrize("kind", ("paged", "ragged"))
@pytest.mark.parametrize("num_tokens", (None, 8))
@pytest.mark.parametrize(
    "sizes, words",
    [
        (dict(q=8), ("8", "16")),
        (dict(q=32), ("32", "16")),
        (dict(k=8), ("8", "16")),
        (dict(k=32), ("32", "16")),
        (dict(v=8), ("8", "16")),
        (dict(q=32, k=32, v=32), ("32", "16")),
        (dict(q=128, k=128, v=128), ("128", "16")),  # as wide as a row of lanes
    ],
    ids=str,
)
def test_another_head_dim_than_the_caches_is_refused_naming_both(
    no_type_hook, kind, num_tokens, sizes, words
):
    cache, attention = cache_of(kind, "float32"), layer_of(kind, {})
    sizes = dict(q=HEAD_DIM, k=HEAD_DIM, v=HEAD_DIM) | sizes
    heads = dict(q=NUM_HEADS, k=NUM_KV_HEADS, v=NUM_KV_HEADS)
    qkv = [jnp.zeros((num_tokens or 3, heads[x], sizes[x])) for x in "qkv"]

    def call(q, k, v):
        return step.__wrapped__(attention, cache, ints((1, 1, 1)), q, k, v, num_tokens)

    with fails_naming(words):
        jax.eval_shape(call, *qkv)


def test_a_layer_is_a_pytree_whose_only_leaves_are_sinks():
    assert jax.tree.leaves(layer_of("paged", dict(sliding_window=3, soft_cap=1.0))) == []
    sinks = jnp.zeros(4)
    assert len(jax.tree.leaves(layer_of("ragged", dict(sinks=sinks)))) == 1


def test_a_kernel_for_another_platform_is_refused_when_lowered(getkey):
    cache = cache_of("paged", "float32")
    attention = layer_of("paged", dict(implementation="pallas_tpu"))
    q = jnp.ones((3, NUM_HEADS, HEAD_DIM))
    k = jnp.ones((3, NUM_KV_HEADS, HEAD_DIM))

    def call(cache):
        return step.__wrapped__(attention, cache, ints((1, 1, 1)), q, k, k, None)

    traced = jax.jit(call).trace(cache)
    with pytest.raises(NotImplementedError, match="pallas_tpu"):
        traced.lower()


# --- Equinox's own layer

SHAPES = {
    "plain": dict(num_heads=4, query_size=32),
    "biases": dict(
        num_heads=2,
        query_size=32,
        use_query_bias=True,
        use_key_bias=True,
        use_value_bias=True,
        use_output_bias=True,
    ),
    "larger qk": dict(num_heads=4, query_size=24, qk_size=16, vo_size=8, output_size=20),
    "larger vo": dict(num_heads=3, query_size=24, qk_size=8, vo_size=16, use_key_bias=True),
    "one head": dict(num_heads=1, query_size=16, output_size=7, use_output_bias=True),
}


def turned(heads, positions):
    """Something that depends on a token's position, in place of a rotary embedding."""
    angle = positions.astype(jnp.float32)[:, None, None] * 0.7
    return heads * jnp.cos(angle) + jnp.flip(heads, axis=-1) * jnp.sin(angle)


@pytest.mark.parametrize(
    "name, with_positions",
    [
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in SHAPES),
        ("larger qk", True),
    ],
)
def test_equinox_layers_give_the_same_numbers(getkey, name, with_positions):
    import eqx_paged

    sizes = SHAPES[name]
    plain = eqx.nn.MultiheadAttention(**sizes, key=getkey())
    paged = eqx_paged.PagedMultiheadAttention.from_equinox(plain)
    lens = (13, 1, 22)
    xs = [jax.random.normal(getkey(), (n, sizes["query_size"])) for n in lens]

    def process_heads(positions):
        if not with_positions:
            return None
        return lambda q, k, v: (turned(q, positions), turned(k, positions), v)

    @quick_jit
    def dense(x):
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        heads = process_heads(jnp.arange(len(x)))
        return plain(x, x, x, mask=mask, process_heads=heads)

    # Padded at the end, which changes nothing before it.
    wanted = [dense(jnp.pad(x, ((0, 22 - len(x)), (0, 0)))) for x in xs]
    wanted = [x[:n] for x, n in zip(wanted, lens)]

    @ft.partial(quick_jit, static_argnames="num_tokens")
    def call(paged, x, cache, q_lens, num_tokens):
        cache, batch, result = cache.append(q_lens, num_tokens)
        out, pages = paged(
            x, cache.layers[0], batch, process_heads=process_heads(batch.positions)
        )
        return out, dataclasses.replace(cache, layers=(pages,)), result

    cache = eqx_paged.PagedKVCache.empty(
        num_layers=1,
        num_pages=12,
        page_size=8,
        num_kv_heads=sizes["num_heads"],
        head_dim=paged.head_dim,
        num_seqs=3,
        max_len=32,
    )
    parts = [[], [], []]
    for q_lens, num_tokens in (((5, 0, 17), 24), ((7, 0, 4), 24), ((1, 1, 1), None)):
        x, first = np.zeros((num_tokens or 3, sizes["query_size"]), np.float32), 0
        for i, n in enumerate(q_lens):
            done = sum(map(len, parts[i]))
            x[first : first + n] = xs[i][done : done + n]
            first += n
        out, cache, result = call(paged, jnp.asarray(x), cache, ints(q_lens), num_tokens)
        out = np.asarray(out)
        assert told(result) == "successful"
        first = 0
        for i, n in enumerate(q_lens):
            parts[i].append(out[first : first + n])
            first += n
    for part, whole in zip(parts, wanted):
        assert_close(np.concatenate(part), whole)


@pytest.mark.parametrize("name", ("key_size", "value_size"))
def test_cross_attention_is_refused(getkey, name):
    import eqx_paged

    layer = eqx.nn.MultiheadAttention(2, 16, **{name: 12}, key=getkey())
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{name})(?=.*12)(?=.*16)"):
        eqx_paged.PagedMultiheadAttention.from_equinox(layer)


def test_active_dropout_is_refused(getkey):
    import eqx_paged

    layer = eqx.nn.MultiheadAttention(2, 16, dropout_p=0.25, key=getkey())
    with pytest.raises(ValueError, match=r"(?s)(?=.*dropout)(?=.*0\.25)"):
        eqx_paged.PagedMultiheadAttention.from_equinox(layer)
    eqx_paged.PagedMultiheadAttention.from_equinox(eqx.nn.inference_mode(layer))


def test_process_heads_may_not_change_shapes(getkey):
    import eqx_paged

    layer = eqx.nn.MultiheadAttention(2, 16, key=getkey())
    paged = eqx_paged.PagedMultiheadAttention.from_equinox(layer)
    cache = eqx_paged.PagedKVCache.empty(
        num_layers=1,
        num_pages=2,
        page_size=8,
        num_kv_heads=2,
        head_dim=8,
        num_seqs=1,
        max_len=8,
    )
    cache, batch, _ = cache.append(ints((1,)))
    with pytest.raises(ValueError, match="process_heads"):
        paged(
            jnp.ones((1, 16)),
            cache.layers[0],
            batch,
            process_heads=lambda q, k, v: (q[:, :1], k, v),
        )


@pytest.mark.parametrize("kind", ("paged", "ragged"))
def test_a_step_must_be_of_the_cache_and_of_as_many_tokens(no_type_hook, kind):
    other = dict(paged="ragged", ragged="paged")[kind]
    caches = {kind: cache_of(kind, "float32") for kind in ("paged", "ragged")}
    q = jnp.zeros((24, NUM_HEADS, HEAD_DIM))
    k = jnp.zeros((24, NUM_KV_HEADS, HEAD_DIM))
    batches = {kind: cache.append(ints((3, 2, 1)), 24)[1] for kind, cache in caches.items()}
    layer, attention = caches[kind].layers[0], layer_of(kind, {})
    for num_tokens in (6, 32):
        with fails_naming((str(num_tokens), "24")):
            attention(jnp.resize(q, (num_tokens, *q.shape[1:])), k, k, layer, batches[kind])
    with fails_naming(("page_size", "8", "40")):
        attention(q, k, k, layer, batches[other])
    bigger = dataclasses.replace(batches[kind], num_pages=99)
    with fails_naming(("num_pages", "99")):
        attention(q, k, k, layer, bigger)
    with fails_naming(("KVPages", "RaggedKV")):
        attention(q, k, k, caches[other].layers[0], batches[kind])
