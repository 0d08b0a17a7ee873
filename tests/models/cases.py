"""Small random decoders, and how to run one over a cache step by step."""

import functools

import eqx_paged
import jax
import jax.numpy as jnp
import numpy as np
from models import Decoder, DecoderConfig

from ..helpers import quick_jit


def published(**changes):
    """A `config.json` of a small model."""
    options = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "transformers_version": "4.51.0",
    }
    return {**options, **changes}


def random_decoder(getkey, *, attention=None, **changes):
    """A decoder in which every weight matters, those of the norms too."""
    return _build(getkey(), DecoderConfig.from_dict(published(**changes)), attention)


@functools.partial(quick_jit, static_argnums=(1, 2))
def _build(key, config, attention):
    decoder = Decoder(config, attention=attention, key=key)
    leaves, structure = jax.tree.flatten(decoder)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    leaves = [x + 0.1 * y for x, y in zip(leaves, noise, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def random_tokens(getkey, *shape):
    return jax.random.randint(getkey(), shape, 0, 97, jnp.int32)


def paged_cache(decoder, *, num_seqs, max_len, num_pages=None, page_size=16):
    config = decoder.config
    pages_per_seq = -(-max_len // page_size)
    return eqx_paged.PagedKVCache.empty(
        num_layers=config.num_hidden_layers,
        num_pages=num_pages or num_seqs * pages_per_seq,
        page_size=page_size,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_seqs=num_seqs,
        max_len=max_len,
        dtype=decoder.norm.weight.dtype,
    )


def ragged_cache(decoder, *, num_seqs, max_len):
    config = decoder.config
    return eqx_paged.RaggedKVCache.empty(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_seqs=num_seqs,
        max_len=max_len,
        dtype=decoder.norm.weight.dtype,
    )


@functools.partial(quick_jit, static_argnums=4)
def _step(decoder, cache, tokens, q_lens, num_tokens):
    cache, batch, result = cache.append(q_lens, num_tokens)
    hidden, cache = decoder(tokens, cache, batch)
    return decoder.unembed(hidden), cache, result


def stepwise_logits(decoder, cache, rows, steps):
    """Feeds `rows`, lists of tokens, as `steps` say: each is a number of tokens a row,
    and the padded number of tokens of a mixed step, or None for a decode step.

    Returns the logits after each token, row by row.
    """
    logits = [[] for _ in rows]
    for q_lens, num_tokens in steps:
        ready = [
            row[len(done) : len(done) + q_len]
            for row, done, q_len in zip(rows, logits, q_lens, strict=True)
        ]
        tokens, places = _packed(ready, num_tokens)
        out, cache, result = _step(
            decoder,
            cache,
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(q_lens, jnp.int32),
            num_tokens,
        )
        assert result == eqx_paged.RESULTS.successful
        for row, mine in enumerate(places):
            logits[row].extend(np.asarray(out)[mine])
    return [np.stack(row) for row in logits]


def _packed(ready, num_tokens):
    """One step's tokens, and where each row's are."""
    if num_tokens is None:
        tokens = [row[0] if row else 0 for row in ready]
        return tokens, [[i] if row else [] for i, row in enumerate(ready)]
    tokens, places = [], []
    for row in ready:
        places.append(list(range(len(tokens), len(tokens) + len(row))))
        tokens.extend(row)
    return tokens + [0] * (num_tokens - len(tokens)), places
