"""What samplers do, in NumPy, and a model whose logits no batch rounds otherwise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def from_the_likeliest(logits):
    """Tokens, the most probable first; of equally probable ones the first."""
    return np.argsort(-np.asarray(logits, np.float64), kind="stable")


def processed(logits, prompt=(), new=(), **parameters):
    """The logits that a chain of some steps draws from, in the order of the parameters."""
    logits = np.array(logits, np.float64)
    for name, value in parameters.items():
        logits = STEPS[name](logits, value, prompt, new)
    return logits


def only(logits, tokens):
    out = np.full_like(logits, -np.inf)
    out[tokens] = logits[tokens]
    return out


def temperature(logits, t, prompt, new):
    return logits / t if t > 0 else only(logits, from_the_likeliest(logits)[:1])


def top_k(logits, k, prompt, new):
    return only(logits, from_the_likeliest(logits)[:k])


def top_p(logits, p, prompt, new):
    order = from_the_likeliest(logits)
    before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
    return logits if p == 1 else only(logits, order[(before < p) | (before == 0)])


def min_p(logits, p, prompt, new):
    probs = softmax(logits)
    return only(logits, np.flatnonzero(probs >= p * probs.max()))


def repetition_penalty(logits, penalty, prompt, new):
    for token in {*prompt, *new}:
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    return logits


def presence_penalty(logits, penalty, prompt, new):
    for token in set(new):
        logits[token] -= penalty
    return logits


def frequency_penalty(logits, penalty, prompt, new):
    for token in new:
        logits[token] -= penalty
    return logits


def logit_bias(logits, biases, prompt, new):
    for token, bias in biases.items():
        logits[token] += bias
    return logits


STEPS = dict(
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=repetition_penalty,
    presence_penalty=presence_penalty,
    frequency_penalty=frequency_penalty,
    logit_bias=logit_bias,
)


def chain_of(parameters):
    """The chain of the same steps, which ends in a draw; parameters as for `processed`."""
    from eqx_paged import samplers

    steps = (getattr(samplers, name)(value) for name, value in parameters.items())
    return samplers.chain(*steps, samplers.categorical)


NUM_STATES, VOCAB = 31, 23


class Table(eqx.Module):
    """Its logits depend on a token and its position alone."""

    logits: jax.Array

    def __call__(self, tokens, cache, batch):
        return self.logits[state_of(tokens, batch.positions)], cache

    def unembed(self, hidden):
        return hidden


def state_of(token, position):
    return (7 * token + 3 * position) % NUM_STATES


def table():
    rng = np.random.default_rng(5)
    return Table(jnp.asarray(rng.standard_normal((NUM_STATES, VOCAB)) * 2, jnp.float32))


def empty(num_seqs, num_pages, **changed):
    import eqx_paged

    sizes = dict(num_layers=1, page_size=8, num_kv_heads=1, head_dim=8, max_len=64)
    return eqx_paged.PagedKVCache.empty(
        num_seqs=num_seqs, num_pages=num_pages, **(sizes | changed)
    )


def prompts_of(lengths):
    """Prompts, as lists, and padded as `generate` takes them."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in lengths]
    padded = np.full((len(lengths), max(lengths)), -7, np.int32)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    return prompts, padded, np.array(lengths, np.int32)


def drawn(model, prompt, key, max_new_tokens, stops=(), **parameters):
    """What is drawn of one prompt, token by token, by its key; and the raw logits."""
    logits, new, raws = np.asarray(model.logits), [], []
    for i in range(max_new_tokens if prompt else 0):
        tokens = [*prompt, *new]
        raws.append(logits[state_of(tokens[-1], len(tokens) - 1)])
        chances = processed(raws[-1], prompt, new, **parameters).astype(np.float32)
        new.append(int(jax.random.categorical(jax.random.fold_in(key, i), chances)))
        if any(new[-len(stop) :] == list(stop) for stop in stops):
            break
    return new, raws


def continued(prompt, max_new_tokens):
    """The most probable tokens after a prompt, by the table."""
    logits, tokens = np.asarray(table().logits), list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(np.argmax(logits[state_of(tokens[-1], len(tokens) - 1)])))
    return tuple(tokens[len(prompt) :])
