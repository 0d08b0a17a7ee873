"""Whether sides of `scripts.bench` made the right tokens."""

import contextlib

import pytest


@pytest.mark.parametrize(
    "tokens, gaps, right, says",
    (
        ([[1, 2, 3], [4, 5]], {}, True, ""),
        ([[1, 2, 3], [4, 6]], {(8, 4, 6): [0.0, 1e-6]}, True, "row 1 differs from token 1"),
        ([[1, 2, 3], [4, 6]], {(8, 4, 6): [0.0, 0.1]}, False, "1.0e-01 std below"),
        # What follows a tie, and the rows after it, must be greedy as well.
        ([[0, 9, 9], [4, 5]], {(7, 0, 9, 9): [1e-6, 0.1, 0.0]}, False, "row 0 differs"),
        (
            [[0, 9, 9], [4, 6]],
            {(7, 0, 9, 9): [1e-6, 0.0, 0.0], (8, 4, 6): [0.0, 0.1]},
            False,
            "row 1 differs from token 1 on, at most 1.0e-01 std below",
        ),
        ([[1, 2], [4, 5]], {}, False, "row 0 differs from token 2 on: 2 tokens, not 3"),
        ([[1, 6], [4, 5]], {}, False, "row 0 differs from token 1 on: 2 tokens, not 3"),
        ([[1, 2, 3], [4, 6, 6]], {}, False, "row 1 differs from token 1 on: 3 tokens"),
        ([[1, 0], [4, 5]], {(7, 1, 0): [0.0, 1e-6]}, True, "row 0 differs from token 1"),
        ([[1, 2, 3]], {}, False, "1 rows, not 2"),
        (
            [[0, 9, 9], [4, 5]],
            {(7, 0, 9, 9): [0.0, float("nan"), 0.0]},
            False,
            "row 0 differs from token 0 on, at most nan std",
        ),
    ),
)
def test_other_tokens_are_right_only_within_rounding(tokens, gaps, right, says):
    from scripts._suites.agree import Asked, compare

    to_audit = dict(gaps)

    def audit(text, num_prompt_tokens):
        assert num_prompt_tokens == 1
        return to_audit.pop(tuple(text))

    asked = Asked([[7], [8]], limits=[3, 2], stops=[0])
    found = compare(tokens, [[1, 2, 3], [4, 5]], asked, audit, "float32")
    assert found[0] is right and says in found[1]
    assert not to_audit


@pytest.mark.parametrize(
    "made, gaps, says",
    (
        ([1, 2, 3], [0.0] * 3, ""),
        ([1, 0], [0.0] * 2, ""),
        ([1, 2], [0.0] * 2, "row 0 has 2 tokens, not 3"),
        ([1, 2, 3, 4], [0.0] * 4, "row 0 has 4 tokens, not 3"),
        ([1, 2, 3], [0.0, 0.1, 0.0], "in row 0 a token is 1.0e-01 std below"),
        ([1, 2, 3], [0.0, float("nan"), 0.0], "in row 0 a token is nan std below"),
    ),
)
def test_ours_are_all_greedy_tokens_that_were_asked_for(made, gaps, says):
    from scripts._suites.agree import Asked, check_greedy, Wrong

    asked = Asked([[7]], limits=[3], stops=[0])
    with pytest.raises(Wrong, match=says) if says else contextlib.nullcontext():
        check_greedy("spam", asked, [made], lambda *_: gaps, "float32")


def test_the_gaps_of_a_text_are_those_of_its_tokens_alone():
    from scripts._suites.ours import Ours
    from scripts._suites.shapes import CONFIGS

    side = Ours.of_random_weights("paged", CONFIGS["tiny"])
    prompt = [1, 2, 3]
    made = side.run([], [prompt], 6, [])["tokens"][0]
    gaps = side.audit(prompt + made, len(prompt))["gaps"]
    assert len(gaps) == 6 and max(gaps) < 1e-5
    other = (made[2] + 1) % CONFIGS["tiny"].vocab_size
    gaps = side.audit(prompt + made[:2] + [other], len(prompt))["gaps"]
    assert len(gaps) == 3 and max(gaps[:2]) < 1e-5 < gaps[2]
