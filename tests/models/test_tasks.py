import numpy as np
import pytest
from models import tasks


def test_there_are_five_facts_on_each_element():
    facts = tasks.facts()
    assert len(facts) == len({question.prompt for question in facts}) == 5 * 118
    for question in (
        ("What is the symbol of iron?", " Fe\n"),
        ("What is the atomic number of iron?", " 26\n"),
        ("What is the atomic mass of iron?", " 55.845\n"),
        ("Which element has the symbol Fe?", " iron\n"),
        ("Which element has the atomic number 26?", " iron\n"),
        ("What is the atomic number of oganesson?", " 118\n"),
    ):
        assert question in facts


def test_masses_rise_but_for_the_known_exceptions():
    masses = [
        (question.prompt.split()[-1], float(question.answer))
        for question in tasks.facts()
        if "mass" in question.prompt
    ]
    falls = {
        f"{first} {second}"
        for (first, mass), (second, next_mass) in zip(masses, masses[1:], strict=False)
        if next_mass < mass
    }
    # Four pairs of stable elements, and heavy ones of which the isotope that lives
    # longest is not the one with the most neutrons.
    assert {
        "argon? potassium?",
        "cobalt? nickel?",
        "tellurium? iodine?",
        "thorium? protactinium?",
    } <= falls
    assert len(falls) <= 12


def test_sums_are_right_and_of_two_or_three_digits():
    rng = np.random.default_rng(0)
    for held_out in (True, False):
        for _ in range(300):
            prompt, answer = tasks.addition(rng, held_out=held_out)
            first, second = prompt.removesuffix("=").split("+")
            assert 2 <= len(first) <= 3 and 2 <= len(second) <= 3
            assert answer == f"{int(first) + int(second)}\n"


def unordered(prompt):
    return frozenset(prompt.removesuffix("=").split("+"))


def test_no_sum_is_both_held_out_and_trained():
    rng = np.random.default_rng(1)
    kept, trained = (
        {unordered(tasks.addition(rng, held_out=flag).prompt) for _ in range(3000)}
        for flag in (True, False)
    )
    assert not kept & trained
    # A sample of all sums, not a class of them: every last digit occurs.
    assert {int(min(pair)) % 10 for pair in kept} == set(range(10))


def test_no_record_is_both_held_out_and_trained():
    rng = np.random.default_rng(2)
    kept, trained = (
        {
            record
            for _ in range(60)
            for record in tasks.records(rng, 512, held_out=flag).text.splitlines()
        }
        for flag in (True, False)
    )
    # There are 51,200, of which one in sixteen is held out.
    assert len(kept) > 3_000 and len(trained) > 20_000
    assert not kept & trained


def test_keys_are_distinct_words():
    keys = tasks.keys()
    assert len(set(keys)) == len(keys) == tasks.NUM_KEYS == 512
    assert all(key.isascii() and key.islower() and key.isalpha() for key in keys)


def test_questions_on_records_are_right():
    context = tasks.Records(keys=("soba", "diri", "pena"), values=("137", "004", "950"))
    assert context.text == "soba=137\ndiri=004\npena=950\n"
    assert context.lookup(1) == ("diri?", "004\n")


@pytest.mark.parametrize("num_records", (1, 2, 330, 512))
def test_a_lookup_asks_for_one_of_its_records(num_records):
    prompt, answer = tasks.lookup(np.random.default_rng(3), num_records)
    *lines, question = prompt.split("\n")
    assert len(lines) == len(set(lines)) == num_records
    assert question.removesuffix("?") + "=" + answer.strip() in lines


def test_questions_follow_from_the_seed_alone():
    def drawn():
        rng = np.random.default_rng(4)
        return tasks.lookup(rng, 20), tasks.addition(rng)

    assert drawn() == drawn()


@pytest.mark.parametrize("num_records", (0, 513, -1))
def test_a_context_of_no_possible_size_is_refused(num_records):
    with pytest.raises(ValueError, match=f"1 to 512, not {num_records}"):
        tasks.records(np.random.default_rng(0), num_records)
