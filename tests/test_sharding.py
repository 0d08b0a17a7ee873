"""A step on several devices, each of which holds a part of the kv heads."""

import dataclasses
import functools as ft
import importlib
import re
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from .helpers import (
    assert_close,
    head_values,
    ints,
    normal,
    quick_jit,
    rng_of,
    stored_as_on,
    told,
)
from .tpu import chips_of, large_copies, needs_libtpu, TOPOLOGIES


BY_HEAD = P(None, "heads")


def mesh_of(num_devices=4):
    return jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("heads",))


def empty(num_kv_heads, head_dim, page_size=8):
    import eqx_paged

    return eqx_paged.PagedKVCache.empty(
        num_layers=1,
        num_pages=12,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_seqs=3,
        max_len=32,
    )


def sharded(cache, mesh):
    layers = jax.device_put(cache.layers, NamedSharding(mesh, BY_HEAD))
    table = jax.device_put(cache.table, NamedSharding(mesh, P()))
    return dataclasses.replace(cache, layers=layers, table=table)


def step(attention, cache, q_lens, q, k, v, num_tokens):
    cache, batch, result = cache.append(q_lens, num_tokens)
    out, layer = attention(q, k, v, cache.layers[0], batch)
    return out, dataclasses.replace(cache, layers=(layer,)), result


def on_mesh(mesh, attention, **options):
    """Each device attends with its part of the heads."""

    def attend(attention, *args):
        return attention(*args)

    by_device = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(P("heads"), BY_HEAD, BY_HEAD, BY_HEAD, BY_HEAD, P()),
        out_specs=BY_HEAD,
        **options,
    )
    return ft.partial(by_device, attention)


def tokens(rng, num_tokens, num_heads, num_kv_heads, head_dim):
    heads = num_heads, num_kv_heads, num_kv_heads
    return [jnp.asarray(normal(rng, (num_tokens, n, head_dim))) for n in heads]


# Chunks with decode, and a decode step.
STEPS = (((9, 1, 5), 16), ((1, 1, 1), None))


@pytest.mark.parametrize(
    "num_kv_heads, head_dim, check_vma",
    (
        (8, 16, True),
        pytest.param(4, 80, False, marks=pytest.mark.slow),
    ),
)
def test_a_layer_equals_the_unsharded_one(getkey, num_kv_heads, head_dim, check_vma):
    import eqx_paged

    rng, mesh = rng_of(getkey()), mesh_of()
    sinks = jnp.asarray(head_values(2 * num_kv_heads))
    attention = eqx_paged.PagedAttention(sinks=sinks, sliding_window=11)
    plain = empty(num_kv_heads, head_dim)
    cache = sharded(plain, mesh)

    @ft.partial(quick_jit, static_argnames=("num_tokens", "is_sharded"))
    def call(attention, *args, num_tokens, is_sharded):
        if is_sharded:
            attention = on_mesh(mesh, attention, check_vma=check_vma)
        return step(attention, *args, num_tokens)

    for q_lens, num_tokens in STEPS:
        new = tokens(rng, num_tokens or 3, 2 * num_kv_heads, num_kv_heads, head_dim)
        args = ints(q_lens), *new
        out, cache, result = call(
            attention, cache, *args, num_tokens=num_tokens, is_sharded=True
        )
        wanted, plain, _ = call(
            attention, plain, *args, num_tokens=num_tokens, is_sharded=False
        )
        assert told(result) == "successful"
        assert_close(out, wanted)
        for x, y in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(plain.layers)):
            assert x.sharding.shard_shape(x.shape)[1] == num_kv_heads // 4
            np.testing.assert_array_equal(x, y)


def write_and_attend(q, k, v, k_pages, v_pages, k_scale, slots, *rows, **how):
    import eqx_paged

    pages = eqx_paged.write_kv(k_pages, v_pages, k, v, slots, **how)
    options = dict(k_scale=k_scale, return_residuals=True)
    return eqx_paged.paged_attention(q, *pages, *rows, **options, **how), pages


@pytest.mark.parametrize(
    "implementation, check_vma",
    (
        ("pallas_tpu", True),
        pytest.param("pallas_tpu", False, marks=pytest.mark.slow),
        pytest.param("xla", True, marks=pytest.mark.slow),
    ),
)
def test_array_functions_equal_the_unsharded_ones(getkey, implementation, check_vma):
    rng = rng_of(getkey())
    q, k, v = tokens(rng, 1, 8, 4, 128)
    pools = (jnp.asarray(normal(rng, (5, 4, 8, 128))) for _ in range(2))
    rows = ints((10,)), ints(((3, 1),))
    args = q, k, v, *pools, jnp.asarray(head_values(4)), ints((9,)), *rows
    how = dict(implementation=implementation, interpret=implementation != "xla")
    by_device = jax.shard_map(
        ft.partial(write_and_attend, **how),
        mesh=mesh_of(),
        in_specs=(*[BY_HEAD] * 5, P("heads"), P(), P(), P()),
        out_specs=BY_HEAD,
        check_vma=check_vma,
    )
    wanted = quick_jit(ft.partial(write_and_attend, implementation="xla"))(*args)
    actual = quick_jit(by_device)(*args)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("check_vma", (True, pytest.param(False, marks=pytest.mark.slow)))
def test_a_gradient_equals_the_unsharded_one(getkey, check_vma):
    import eqx_paged

    rng = rng_of(getkey())
    q, k, v = tokens(rng, 2, 8, 4, 16)
    pools = [jnp.asarray(normal(rng, (3, 4, 8, 16))) for _ in range(2)]
    rows = ints((9, 3)), ints(((1, 0), (2, 0)))

    def loss(attend, q, k_pages, v_pages, k_scale):
        return jnp.sum(attend(q, k_pages, v_pages, k_scale, *rows) ** 2)

    def attend(q, k_pages, v_pages, k_scale, *rows):
        return eqx_paged.paged_attention(q, k_pages, v_pages, *rows, k_scale=k_scale)

    by_device = jax.shard_map(
        attend,
        mesh=mesh_of(),
        in_specs=(*[BY_HEAD] * 3, P(), P(), P()),
        out_specs=BY_HEAD,
        check_vma=check_vma,
    )
    args = q, *pools, jnp.float32(0.5)
    gradients = [
        quick_jit(jax.grad(ft.partial(loss, f), argnums=(0, 1, 2, 3)))(*args)
        for f in (by_device, attend)
    ]
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y)


@pytest.mark.slow
def test_a_sharded_cache_is_forked_saved_and_loaded(getkey, tmp_path):
    import eqx_paged

    rng, mesh = rng_of(getkey()), mesh_of()
    on_one, on_all = (
        quick_jit(ft.partial(step, attend), static_argnums=5)
        for attend in (
            eqx_paged.PagedAttention(),
            on_mesh(mesh, eqx_paged.PagedAttention()),
        )
    )
    cache = sharded(empty(4, 16), mesh)
    new = tokens(rng, 16, 8, 4, 16)
    _, cache, _ = on_all(cache, ints((12, 0, 0)), *new, 16)
    cache, _ = cache.fork(0, 1)
    new = tokens(rng, 3, 8, 4, 16)
    _, cache, _ = on_all(cache, ints((1, 1, 0)), *new, None)
    cache.save(tmp_path / "rows", [0, 1])
    plain, _ = empty(4, 16).load(tmp_path / "rows", [0, 1])
    again, result = sharded(empty(4, 16), mesh).load(tmp_path / "rows", [0, 1])
    assert told(result) == "successful"
    for x in jax.tree.leaves(again.layers):
        assert x.sharding.shard_shape(x.shape)[1] == 1
    # What was loaded attends as what was saved does.
    new = tokens(rng, 3, 8, 4, 16)
    wanted, *_ = on_all(cache, ints((1, 1, 0)), *new, None)
    for loaded, run in ((plain, on_one), (again, on_all)):
        out, *_ = run(loaded, ints((1, 1, 0)), *new, None)
        assert_close(out, wanted)


class Echo(eqx.Module):
    """A model of attention alone."""

    attend: Callable

    def __call__(self, tokens, cache, batch):
        x = jnp.sin(tokens[:, None].astype(jnp.float32) * jnp.arange(1.0, 17.0)[None])
        q = jnp.repeat(x[:, None], 8, axis=1)
        out, layer = self.attend(q, q[:, :4], q[:, :4], cache.layers[0], batch)
        return x + out[:, 0], dataclasses.replace(cache, layers=(layer,))

    def unembed(self, hidden):
        return hidden


@pytest.mark.slow
def test_generation_with_a_sharded_cache_gives_the_same_tokens():
    import eqx_paged

    prompts, prompt_lens = ints(((3, 4, 5, 6), (9, 2, 0, 0))), ints((4, 2))
    found = []
    for attend, cache in (
        (eqx_paged.PagedAttention(), empty(4, 16)),
        (on_mesh(mesh_of(), eqx_paged.PagedAttention()), sharded(empty(4, 16), mesh_of())),
    ):
        generation, after = eqx_paged.generate(
            Echo(attend), cache, prompts, prompt_lens, max_new_tokens=8
        )
        found.append((generation.tokens, after.kv_lens))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert len(np.unique(found[0][0])) > 4


def test_heads_that_do_not_divide_are_refused_naming_both():
    import eqx_paged

    cache = empty(6, 16)
    q, k, v = (jnp.zeros((3, n, 16)) for n in (12, 6, 6))
    attention = on_mesh(mesh_of(), eqx_paged.PagedAttention())
    with pytest.raises(ValueError, match="(?s)(?=.*heads)(?=.*6)(?=.*4)"):
        jax.eval_shape(lambda: step(attention, cache, ints((1, 1, 1)), q, k, v, None))


# --- What the compiler says

COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+)(-start)?\("
)


@needs_libtpu
@pytest.mark.parametrize(
    "generation, head_dim, num_tokens",
    (
        ("v5e", 128, None),
        *(
            pytest.param(generation, head_dim, num_tokens, marks=pytest.mark.slow)
            for generation in TOPOLOGIES
            for head_dim in (64, 80, 128)
            for num_tokens in (None, 64)
            if (generation, head_dim, num_tokens) != ("v5e", 128, None)
        ),
    ),
)
def test_a_step_compiles_for_several_chips_and_moves_no_page(
    monkeypatch, generation, head_dim, num_tokens
):
    import eqx_paged

    seen = []
    for op in ("paged_attention", "ragged_paged_attention", "write_kv"):
        kernel = importlib.import_module(f"eqx_paged.kernels.{op}.pallas_tpu")
        chosen = kernel.generation
        monkeypatch.setattr(kernel, "generation", lambda: seen.append(chosen()) or seen[-1])
    mesh = jax.sharding.Mesh(chips_of(generation), ("heads",))

    def with_sharding(tree, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def make():
        return eqx_paged.PagedKVCache.empty(
            num_layers=1,
            num_pages=2048,
            page_size=16,
            num_kv_heads=8,
            head_dim=head_dim,
            num_seqs=4,
            max_len=1024,
            dtype=jnp.bfloat16,
        )

    with stored_as_on("tpu"):
        cache = jax.eval_shape(make)
    cache = eqx.tree_at(
        lambda c: (c.layers, c.table),
        cache,
        (with_sharding(cache.layers, BY_HEAD), with_sharding(cache.table, P())),
    )
    shapes = ((num_tokens or 4, n, head_dim) for n in (32, 8, 8))
    new = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    q_lens = with_sharding(jax.ShapeDtypeStruct((4,), jnp.int32), P())
    args = q_lens, *with_sharding(new, BY_HEAD)

    def call(cache, *args):
        attention = on_mesh(mesh, eqx_paged.PagedAttention())
        return step(attention, cache, *args, num_tokens)

    traced = jax.jit(call, donate_argnums=0).trace(cache, *args)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    assert not COLLECTIVE.findall(text)
    pool = cache.layers[0].k_pages
    share = pool.size // mesh.size
    assert not large_copies(compiled, least=share)
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * 2 * share
    assert {chip.name for chip in seen} == {generation}
