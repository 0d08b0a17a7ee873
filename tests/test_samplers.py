"""Steps from logits to logits and draws, against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from .helpers import ints, quick_jit
from .sampling import chain_of, processed, softmax


# Ties among them, at the top as well, and one that is never to be drawn.
LOGITS = [1.5, 3.0, -1.0, 3.0, 0.0, -np.inf, 0.5, 0.5, 2.0, -0.0, 0.5, -2.5]
NEUTRAL = dict(
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
    temperature=1.0,
    top_k=10**12,
    top_p=1.0,
    min_p=0.0,
)
CASES = (
    {},
    dict(temperature=0.6),
    dict(temperature=3.0),
    dict(temperature=0.0),
    dict(top_k=1),
    dict(top_k=6),  # between the three tokens of 0.5
    dict(top_k=11),  # all that can be drawn
    dict(top_k=12),
    dict(top_p=0.0),
    dict(top_p=0.3),  # the first of two
    dict(top_p=0.9),
    dict(top_p=0.945),  # between ties
    dict(top_p=0.9999999),
    dict(min_p=1.0),
    dict(min_p=0.1),
    dict(repetition_penalty=1.7),
    dict(repetition_penalty=0.5),
    dict(presence_penalty=1.0),
    dict(frequency_penalty=0.7),
    dict(frequency_penalty=-0.7),
    dict(logit_bias={0: 2.0, 3: -np.inf, 4: -1.0, 99: 5.0}),
    dict(temperature=0.0, repetition_penalty=4.0, logit_bias={8: 1.0}),
    dict(temperature=0.7, top_k=8, top_p=0.8, presence_penalty=0.5),
    dict(temperature=1.4, top_p=0.95, min_p=0.05, repetition_penalty=1.2),
)
PROMPT, NEW = [3, 3, 4, 0], [2, 6, 2, 2]


def compiled(function):
    """As one program, in which the function's own arrays are constants."""
    return quick_jit(lambda *arguments: function(*arguments))


def history(num_rows):
    """As `PROMPT` and `NEW` are, padded with what is no token of theirs."""
    from eqx_paged import samplers

    rows = [jnp.tile(ints([*x, 1, -5, 70]), (num_rows, 1)) for x in (PROMPT, NEW)]
    lens = ints([4] * num_rows)
    return samplers.History(rows[0], lens, rows[1], lens)


def chain_of_cases(num_each=1):
    """One chain of all steps, whose rows have the parameters of a case each."""
    whole = {
        name: [(NEUTRAL | case)[name] for case in CASES for _ in range(num_each)]
        for name in NEUTRAL
    }
    biases = whole.pop("logit_bias")
    arrays = {name: np.array(values) for name, values in whole.items()}
    return chain_of({name: arrays.get(name, biases) for name in NEUTRAL})


def expected(case):
    known = {n for n in LOGITS if n > -np.inf}
    assert len(known) < len(LOGITS) - 1  # ties
    case = NEUTRAL | case
    case["logit_bias"] = {t: b for t, b in case["logit_bias"].items() if t < len(LOGITS)}
    return processed(LOGITS, PROMPT, NEW, **case)


def test_each_row_is_changed_by_its_own_parameters():
    logits = jnp.tile(jnp.array(LOGITS, jnp.bfloat16), (len(CASES), 1))  # exact in it
    out = compiled(chain_of_cases().process)(logits, history(len(CASES)))
    assert out.dtype == jnp.float32
    for row, case in zip(np.asarray(out), CASES):
        # A few roundings of numbers up to 12.
        np.testing.assert_allclose(
            row, expected(case), rtol=1e-5, atol=0, err_msg=f"{case}"
        )


def test_tokens_are_drawn_with_their_probabilities():
    num_each = 3000
    num_rows = num_each * len(CASES)
    logits = jnp.tile(jnp.array(LOGITS, jnp.float32), (num_rows, 1))
    keys = jax.random.split(jax.random.key(3), num_rows)
    draw = compiled(chain_of_cases(num_each))
    tokens = np.asarray(draw(logits, keys, history(num_rows))).reshape(len(CASES), -1)
    for case, drawn in zip(CASES, tokens):
        probs = softmax(expected(case))
        counts = np.bincount(drawn, minlength=len(LOGITS))
        assert not np.any(counts[probs == 0]), case
        # Rarer tokens than chi-square is good for are counted together.
        rare = num_each * probs < 5
        observed, wanted = (
            np.append(x[~rare], x[rare].sum()) for x in (counts, num_each * probs)
        )
        wanted += 1e-9  # where nothing is rare
        # Of 24 right cases, one in 400 runs would fail; but the keys are fixed.
        bound = scipy.stats.chi2.ppf(1 - 1e-4, max(1, len(wanted) - 1))
        assert np.sum((observed - wanted) ** 2 / wanted) < bound, case


def random_rows():
    """Logits of a vocabulary of a usual form: random, with ties, some of them forbidden."""
    rng = np.random.default_rng(4)
    logits = np.round(rng.standard_normal((40, 300)) * 3, 1)
    logits[rng.random(logits.shape) < 0.2] = -np.inf
    return logits.astype(np.float32), rng


@pytest.mark.parametrize("name", ("top_k", "top_p", "min_p"))
def test_cuts_of_random_logits(name):
    logits, rng = random_rows()
    limits = rng.integers(1, 330, 40) if name == "top_k" else rng.random(40)
    out = compiled(chain_of({name: limits}).process)(jnp.asarray(logits))
    for row, before, limit in zip(np.asarray(out), logits, limits):
        np.testing.assert_array_equal(row, processed(before, **{name: limit}))


def test_the_draw_of_a_row_depends_on_its_key_alone():
    chain = compiled(chain_of(dict(temperature=1.3, top_p=0.9)))
    logits, _ = random_rows()
    keys = jax.random.split(jax.random.key(1), 40)
    together = chain(jnp.asarray(logits), keys)
    for i in range(3):
        alone = chain(jnp.asarray(logits[i : i + 1]), keys[i : i + 1])
        assert alone.tolist() == [int(together[i])]
    older = jax.random.key_data(keys)
    assert chain(jnp.asarray(logits), older).tolist() == together.tolist()


def test_a_row_of_nan_changes_no_other():
    chain = chain_of(dict(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01))
    logits, _ = random_rows()
    keys = jax.random.split(jax.random.key(1), 40)
    spoiled = logits.copy()
    spoiled[7, 11:] = np.nan
    spoiled[9] = -np.inf
    draw = compiled(chain)
    good, tokens = (np.asarray(draw(jnp.asarray(x), keys)) for x in (logits, spoiled))
    others = np.setdiff1d(np.arange(40), (7, 9))
    np.testing.assert_array_equal(tokens[others], good[others])
    assert 0 <= tokens[7] < 300 and tokens[9] == 0


def test_a_step_and_a_draw_may_be_your_own():
    from eqx_paged import samplers

    logits = jnp.array([[0.0, 2.0, 1.0], [3.0, -1.0, 2.0]])
    without_the_best = samplers.chain(
        lambda x: jnp.where(x == x.max(axis=1, keepdims=True), -jnp.inf, x), samplers.greedy
    )
    assert without_the_best(logits).tolist() == [2, 2]
    least = samplers.chain(lambda x: -x, lambda x, key: jnp.argmax(x, axis=1))
    assert least(logits).tolist() == [0, 1]


# --- What can go wrong


@pytest.mark.parametrize(
    "name, value",
    (
        *(("temperature", t) for t in (-1.0, 1e-7, np.inf, np.nan, "warm")),
        *(("top_k", k) for k in (0, -3, 1.5)),
        *(("top_p", p) for p in (-0.1, 1.1, np.nan, np.array([[0.5]]))),
        *(("min_p", p) for p in (-0.1, 1.1, np.array([0.5, 2.0]))),
        *(("repetition_penalty", p) for p in (0.0, -1.0, np.inf)),
        *((f"{name}_penalty", np.nan) for name in ("presence", "frequency")),
        *(("logit_bias", b) for b in ({-1: 0.0}, {2**31: 0.0}, {0: np.inf}, {0: np.nan})),
        *(("logit_bias", b) for b in ({1.7: 2.0}, {True: 1.0}, {"a": 1.0})),
        *(("top_p", p) for p in (0.5 + 0j, np.array([0.5, 0.5 + 1j]))),
        ("logit_bias", []),
        *(("logit_bias", b) for b in ({1: "much"}, {1: None}, 5, None, [5])),
        # Finite or above 0, but not in float32.
        *(("temperature", 1e39), ("logit_bias", {0: 1e39})),
        *(("repetition_penalty", p) for p in (1e39, 1e-50, np.array([1.0, 1e39]))),
        *((f"{name}_penalty", -1e39) for name in ("presence", "frequency")),
    ),
)
def test_a_parameter_out_of_its_range_is_refused(no_type_hook, name, value):
    from eqx_paged import samplers

    with pytest.raises(ValueError):
        getattr(samplers, name)(value)


def test_a_chain_that_cannot_draw_is_refused(no_type_hook):
    from eqx_paged import samplers

    for steps in ((), (samplers.top_k(3),), (samplers.top_k(3), 0.7, samplers.greedy)):
        with pytest.raises(ValueError, match="chain"):
            samplers.chain(*steps)
    logits = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="needs a key"):
        samplers.chain(samplers.categorical)(logits)
    with pytest.raises(ValueError, match="repetition_penalty needs the history"):
        samplers.chain(samplers.repetition_penalty(2.0), samplers.greedy)(logits)
    for wrong in (lambda x: x[:, :2], lambda x: x > 0):
        with pytest.raises(ValueError, match="must return logits of shape"):
            samplers.chain(wrong, samplers.greedy)(logits)
