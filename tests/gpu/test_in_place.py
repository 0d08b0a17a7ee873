"""Compiled for a GPU, a donated step writes into the cache in place, and the work of a step
is shared out once for all layers."""

import collections
import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from scripts._gpu_compile import compile_for

from ..helpers import ints, large_moves, stored_as_on


pytestmark = [
    pytest.mark.gpu_aot,
    # JAX has deprecated what the kernels are written in, since 0.11.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]
NUM_SEQS, NUM_LAYERS, PAGE_SIZE, NUM_PAGES = 4, 3, 16, 2048


def assert_in_place(program, pages):
    """Of `pages`, arrays, nothing is copied and all are overwritten."""
    layer = min(x.size * x.dtype.itemsize for x in pages)
    memory = program.memory_analysis()
    num_bytes = sum(x.size * x.dtype.itemsize for x in pages)
    assert memory.alias_size_in_bytes >= num_bytes
    assert memory.temp_size_in_bytes < layer
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < layer
    assert large_moves(program, layer) == []


@pytest.mark.parametrize("architecture", ("sm_90a", "sm_80"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float8_e4m3fn"))
@pytest.mark.parametrize("head_dim", (64, 80, 128))
def test_new_keys_and_values_are_written_in_place(architecture, dtype, head_dim):
    import eqx_paged

    lanes = 80 if head_dim == 80 else 128
    shape = NUM_PAGES, 8, PAGE_SIZE * head_dim // lanes, lanes
    pages = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    new = jax.ShapeDtypeStruct((64, 8, head_dim), jnp.float32)
    slots = jax.ShapeDtypeStruct((64,), jnp.dtype(jnp.int32))
    args = (pages, pages, new, new, slots)
    compiled = compile_for(architecture, eqx_paged.write_kv, args, donate=(0, 1))
    assert_in_place(compiled.program, (pages, pages))


def empty(dtype, num_layers=NUM_LAYERS):
    import eqx_paged

    with stored_as_on("gpu"):
        return eqx_paged.PagedKVCache.empty(
            num_layers=num_layers,
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            num_kv_heads=4,
            head_dim=64,
            num_seqs=NUM_SEQS,
            max_len=256,
            dtype=jnp.dtype(dtype),
        )


class Attending(eqx.Module):
    """A model of attention alone."""

    def __call__(self, tokens, cache, batch):
        import eqx_paged

        layers = []
        x = tokens[:, None].astype(jnp.bfloat16) * jnp.ones((1, 64), jnp.bfloat16)
        for layer in cache.layers:
            q = jnp.repeat(x[:, None], 8, axis=1)
            k = q[:, :4]
            out, layer = eqx_paged.PagedAttention()(q, k, k, layer, batch)
            x = x + out[:, 0]
            layers.append(layer)
        return x, dataclasses.replace(cache, layers=tuple(layers))

    def unembed(self, hidden):
        return hidden


def compiled_step(cache, num_tokens):
    """A step, as `generate` makes it."""

    def step(cache, tokens):
        q_lens = jnp.full(NUM_SEQS, len(tokens) // NUM_SEQS, jnp.int32)
        cache, batch, _ = cache.append(q_lens, num_tokens)
        hidden, cache = Attending()(tokens, cache, batch)
        return cache, hidden

    tokens = jax.ShapeDtypeStruct((num_tokens or NUM_SEQS,), jnp.dtype(jnp.int32))
    return compile_for("sm_90a", step, (cache, tokens), donate=(0,))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("num_tokens", (None, 64))
def test_a_donated_step_copies_no_layer(dtype, num_tokens):
    cache = empty(dtype)
    compiled = compiled_step(cache, num_tokens)
    assert_in_place(compiled.program, jax.tree.leaves(cache.layers))
    # It is our kernels that read the cache.
    names = [kernel.name for kernel in compiled.kernels]
    assert any("paged_attention" in name for name in names), names


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_generation_with_a_donated_cache_copies_no_layer(dtype):
    import eqx_paged

    def run(cache, prompts, prompt_lens):
        return eqx_paged.generate(
            Attending(),
            cache,
            prompts,
            prompt_lens,
            max_new_tokens=8,
            prefill_chunk=32,
            throw=False,
        )

    cache = empty(dtype)
    args = (cache, jnp.ones((NUM_SEQS, 20), jnp.int32), ints([20, 3, 0, 7]))
    compiled = compile_for("sm_90a", run, args, donate=(0,))
    assert_in_place(compiled.program, jax.tree.leaves(cache.layers))


def launches(program):
    """How many times a program launches something for each type of result."""
    text = program.as_text()
    entry = text[text.index("\nENTRY") :]
    found = re.findall(
        r"^  (?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) (?:fusion|custom-call|sort|copy)\(",
        entry,
        re.MULTILINE,
    )
    return collections.Counter(re.sub(r"\{.*?\}", "", result) for result in found)


def of_integers(counts):
    """Those whose results are addresses and lengths, not activations."""
    return {x: n for x, n in counts.items() if not re.search(r"\b(f32|bf16)\[", x)}


@pytest.mark.parametrize("num_tokens", (None, 64))
def test_the_work_of_a_step_is_shared_out_once_for_all_layers(num_tokens):
    one, three = (
        launches(compiled_step(empty("bfloat16", num_layers), num_tokens).program)
        for num_layers in (1, 3)
    )
    assert of_integers(three) == of_integers(one)
    # The rest is not: each layer's kernel is there.
    assert sum(three.values()) - sum(one.values()) >= 2 * 4
