"""What a Llama decoder must compute, in plain Python and float64 NumPy.

Reads a published checkpoint's tensors by their names. Nothing here uses JAX or the
project.
"""

import numpy as np


def llama_logits(tensors, config, tokens):
    """The logits after each of `tokens`, a list: `[len(tokens), vocab_size]`."""
    weights = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}."
        h = _rms_norm(x, weights[own + "input_layernorm.weight"], eps)
        q, k, v = (h @ weights[own + f"self_attn.{name}_proj.weight"].T for name in "qkv")
        out = np.zeros_like(q)
        for head in range(heads):
            mine = slice(head * head_dim, (head + 1) * head_dim)
            shared = head // (heads // kv_heads)
            theirs = slice(shared * head_dim, (shared + 1) * head_dim)
            rotated = _rotate(q[:, mine], theta), _rotate(k[:, theirs], theta)
            out[:, mine] = _attend(*rotated, v[:, theirs])
        x = x + out @ weights[own + "self_attn.o_proj.weight"].T
        h = _rms_norm(x, weights[own + "post_attention_layernorm.weight"], eps)
        gate = h @ weights[own + "mlp.gate_proj.weight"].T
        up = h @ weights[own + "mlp.up_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * up
        x = x + inner @ weights[own + "mlp.down_proj.weight"].T
    x = _rms_norm(x, weights["model.norm.weight"], eps)
    tied = config.get("tie_word_embeddings", False)
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def _rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def _rotate(x, theta):
    """Each pair of channels `(i, i + head_dim / 2)` as one complex number."""
    length, head_dim = x.shape
    x = x.copy()
    half = head_dim // 2
    for position in range(length):
        turn = np.exp(1j * position * theta ** (-np.arange(half) / half))
        pairs = (x[position, :half] + 1j * x[position, half:]) * turn
        x[position] = np.concatenate([pairs.real, pairs.imag])
    return x


def _attend(q, k, v):
    out = np.zeros_like(q)
    for position in range(len(q)):
        logits = k[: position + 1] @ q[position] / np.sqrt(q.shape[1])
        weights = np.exp(logits - logits.max())
        out[position] = weights @ v[: position + 1] / weights.sum()
    return out
