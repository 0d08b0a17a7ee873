"""The parts of `scripts.bench`, each for itself."""

import collections
import dataclasses
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from .. import oracle


# --- Measuring


def test_sides_run_in_turn():
    from scripts._suites.measure import in_turn

    order = []

    def side(name):
        return lambda: order.append(name) or float(len(order))

    times = in_turn({name: side(name) for name in "abc"}, rounds=40)
    assert all(sorted(order[i : i + 3]) == [*"abc"] for i in range(0, 120, 3))
    # Each comes after each other one, if not in every round.
    pairs = collections.Counter(zip(order, order[1:], strict=False))
    assert all(pairs[a, b] >= 10 for a in "abc" for b in "abc" if a != b)
    for name in "abc":
        assert times[name] == [i + 1 for i, x in enumerate(order) if x == name]


def test_a_side_that_is_lost_is_left_out():
    from scripts._suites.measure import in_turn, Lost

    def breaks_the_second_time():
        if times:
            raise Lost("there are no eggs")
        times.append(1.0)
        return 1.0

    times, lost = [], {}
    sides = {"a": lambda: 2.0, "b": breaks_the_second_time}
    assert in_turn(sides, rounds=3, lost=lost) == {"a": [2.0] * 3}
    assert lost == {"b": "there are no eggs"}
    with pytest.raises(Lost):
        in_turn(sides, rounds=1)


def test_three_rounds_take_place_when_the_time_is_up():
    from scripts._suites.measure import in_turn

    assert in_turn({"a": lambda: 1.0}, rounds=9, seconds=0.0) == {"a": [1.0] * 3}


def test_quartiles():
    from scripts._suites.measure import quartiles

    assert quartiles([7.0]) == (7, 7, 7)
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2, 3, 4)


def test_a_cost_is_the_better_the_smaller_it_is():
    from scripts._suites.record import ratios_of, Row

    figures = {"a": {"tok_s": 6.0, "first_token_s": 6.0}}
    figures["b"] = {"tok_s": 3.0, "first_token_s": 3.0}
    rows = [Row("case", {}, side, figures=x) for side, x in figures.items()]
    rows.append(Row("case", {}, "c", reason="absent"))
    found = ratios_of(rows, ("tok_s", "first_token_s"), ("a",))
    assert [(x.side, x.other, x.ratio) for x in found] == [("a", "b", 2), ("a", "b", 0.5)]


# --- Attention


def contexts():
    from scripts._suites.contexts import REHEARSAL

    return REHEARSAL


def test_pages_and_buffers_hold_the_same_keys():
    for case in contexts():
        data = case.data()
        pool, _ = data.pools()
        buffer, _ = data.buffers()
        for row in range(case.num_seqs):
            for position in range(case.context):
                page, offset = divmod(position, case.page_size)
                key = data.k[row, :, position]
                assert (pool[data.table[row, page], :, offset] == key).all()
                assert (buffer[row, position] == key).all()


def test_every_form_of_ours_is_attention():
    from scripts._suites.attention import our_sides, TOLERANCE

    for case in contexts():
        data = case.data()
        if case.dtype == "bfloat16":
            rounded = [np.array(jnp.asarray(x, jnp.bfloat16), np.float32) for x in data[:3]]
            data = data._replace(**dict(zip("qkv", rounded)))
        for name, side in our_sides(case).items():
            for row, out in enumerate(np.asarray(side(), np.float32)):
                length = data.lens[row]
                k, v = (x[row, :, :length].swapaxes(0, 1) for x in (data.k, data.v))
                wanted = oracle.attention(data.q[None, row], k, v)[0][0]
                error = np.abs(out - wanted).max()
                assert error < TOLERANCE[case.dtype], (name, case.name)


def test_a_form_that_is_not_attention_is_not_timed(monkeypatch):
    from scripts._suites import agree, attention

    sides = attention.our_sides

    def wrong_sides(case):
        return {**sides(case), "contiguous": lambda: sides(case)["paged"]() + 1}

    monkeypatch.setattr(attention, "our_sides", wrong_sides)
    with pytest.raises(agree.Wrong, match="contiguous is 1.0e\\+00 off in 2 x 32"):
        attention.time_case(contexts()[0], None, 0.1, 1.0)


# --- Update


@pytest.mark.parametrize("name", ("full", "QUICK", "REHEARSAL"))
def test_the_smallest_cache_has_room_for_all_steps(name):
    from scripts._suites import update

    plan = update.Plan() if name == "full" else getattr(update, name)
    for dtype in plan.dtypes:
        for page_size in plan.page_sizes:
            small = plan.cache_mib[0]
            case = update.Case(small, small, page_size, dtype)
            longest = case.tokens_per_row + update.WARM_UP + plan.rounds
            pages = update.NUM_SEQS * -(-longest // page_size)
            assert pages * page_size * case.token_bytes <= small * update.MIB


# --- Generation


def test_a_checkpoint_is_one_that_loads_and_is_always_the_same(tmp_path):
    import models
    from scripts._suites.shapes import checkpoint, CONFIGS, num_weights

    first = checkpoint("tiny", tmp_path / "a")
    second = checkpoint("tiny", tmp_path / "b")
    weights = (first / "model.safetensors").read_bytes()
    assert weights == (second / "model.safetensors").read_bytes()
    model = models.load_checkpoint(first)
    assert model.config == CONFIGS["tiny"]
    assert len(weights) == pytest.approx(4 * num_weights(model.config), abs=10_000)
    # It is not written again.
    (first / "model.safetensors").write_bytes(b"")
    assert checkpoint("tiny", tmp_path / "a") == first
    assert (first / "model.safetensors").read_bytes() == b""


def test_the_models_are_of_the_published_sizes():
    from scripts._suites.shapes import CONFIGS, num_weights

    assert num_weights(CONFIGS["135m"]) == 134_515_008
    assert num_weights(CONFIGS["1b"]) == 1_235_814_400


def test_rows_end_one_after_the_other():
    from scripts._suites.peers.common import cut
    from scripts._suites.workloads import chosen_stops

    tokens = np.arange(32).reshape(4, 8).tolist()
    stops = chosen_stops(tokens)
    assert [len(cut(row, stops)) for row in tokens] == [2, 4, 6, 8]


FAKE = """
import sys
from scripts._suites.protocol import serve

class Fake:
    def versions(self):
        return {"spam": sys.argv[1]}
    def load(self, checkpoint, dtype):
        return {}
    def audit(self, tokens, num_prompt_tokens):
        return {"gaps": [float(x == 666) for x in tokens[num_prompt_tokens:]]}
    def peak_bytes(self):
        return 2**20
    def run(self, prefix, prompts, max_new_tokens, stops):
        print("spam")  # not an answer
        if sys.argv[1] == "broken":
            raise RuntimeError("there are no eggs")
        if sys.argv[1] == "tired" and max_new_tokens == 1:
            raise RuntimeError("no more eggs")
        tokens = [list(range(max_new_tokens)) for _ in prompts]
        if sys.argv[1] == "wrong":
            tokens[0][-1] = 666
        return {"tokens": tokens, "seconds": 0.5 + max_new_tokens, "cache_bytes": 2**20}
    def serve(self, prompts, limits, num_rows, in_turn=False):
        if sys.argv[1] == "broken":
            raise RuntimeError("there are no eggs")
        tokens = [list(range(limit)) for limit in limits]
        if sys.argv[1] == "wrong":
            tokens[0][-1] = 666
        return {"tokens": tokens, "seconds": 1.0 if in_turn else 2.0}

serve(Fake())
"""


@pytest.fixture
def command_of_fake(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    start = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    return lambda how: [sys.executable, "-c", start, str(tmp_path / "fake.py"), how]


@pytest.fixture
def plan_of_fakes(tmp_path, monkeypatch, command_of_fake):
    """A plan whose sides, ours too, are processes that do as their names say."""
    from scripts._suites import agree, generate
    from scripts._suites.process import Process
    from scripts._suites.workloads import Workload

    def ours(name, log, _):
        return Process(name, command_of_fake("right"), log)

    for module in (agree, generate):
        monkeypatch.setattr(module, "ours", ours)
    monkeypatch.setattr(
        generate, "REHEARSAL", (Workload("2 x 3", (3, 3), max_new_tokens=5),)
    )
    peers = {x: command_of_fake(x) for x in ("right", "wrong", "broken", "tired")}
    models = (("tiny", "float32"),)
    about = {"read_ceiling_gb_s": 2.0}
    return generate.Plan(
        models, True, peers, {"far": "it is away"}, tmp_path, tmp_path, about
    )


def test_a_peer_that_is_wrong_or_broken_is_listed_with_the_reason(plan_of_fakes):
    from scripts._suites import generate
    from scripts._suites.shapes import CONFIGS, num_weights

    rows = {row.side: row for row in generate.run(plan_of_fakes)}
    reasons = {side: row.reason for side, row in rows.items()}
    assert [x for x in reasons if not reasons[x]] == ["paged", "contiguous", "right"]
    says = "wrong: row 0 differs from token 4 on, at most 1.0e+00 std below the largest"
    assert reasons["wrong"].startswith(says)
    assert reasons["broken"] == "it ended with 1: RuntimeError: there are no eggs"
    assert reasons["tired"] == "it ended with 1: RuntimeError: no more eggs"
    assert reasons["far"] == "it is away"
    # Five tokens take 5.5 seconds, the first of them 1.5.
    figures = rows["right"].figures
    assert figures["prefill_tok_s"] == pytest.approx(6 / 1.5)
    assert figures["decode_tok_s"] == pytest.approx(2 * 4 / 4)
    assert figures["tok_s"] == pytest.approx(10 / 5.5)
    assert figures["peak_gib"] == 2**-10
    weights = 4 * num_weights(CONFIGS["tiny"])
    assert figures["of_needed"] == pytest.approx(2**20 / (weights + 2**20))
    assert figures["weight_gb_s"] == pytest.approx(weights / 1e9)
    assert figures["of_roofline"] == pytest.approx(weights / 1e9 / 2)


@pytest.fixture
def queue_of_fakes(tmp_path, monkeypatch, command_of_fake):
    """The same for more prompts than rows; theirs are `how` by name."""
    from scripts._suites import agree, serve
    from scripts._suites.process import Process

    def plan_of(how, peers):
        def ours(name, log, _):
            return Process(name, command_of_fake(how), log)

        for module in (agree, serve):
            monkeypatch.setattr(module, "ours", ours)
        commands = {x: command_of_fake(how) for x, how in peers.items()}
        absent = {"transformers continuous": "it is away", "levanter": "it is away too"}
        absent = {x: why for x, why in absent.items() if x not in peers}
        return serve.Plan(("tiny",), True, commands, absent, tmp_path, tmp_path, {})

    return plan_of


def test_a_queue_is_served_by_all_sides(queue_of_fakes):
    from scripts._suites import serve
    from scripts._suites.workloads import SMALL_QUEUE

    peers = {"transformers continuous": "right", "eqx-zoo": "right"}
    rows = {row.side: row for row in serve.run(queue_of_fakes("right", peers))}
    assert list(rows) == ["in turn", "batch after batch", "transformers continuous"]
    num_new = sum(SMALL_QUEUE.prompts(512)[1])
    for side, row in rows.items():
        assert row.figures["tok_s"] == num_new / (1.0 if side == "in turn" else 2.0)
        assert len(row.seconds["all"]) == 3


@pytest.mark.parametrize(
    "peers, reason",
    (
        ({}, "it is away"),
        ({"transformers continuous": "wrong"}, "wrong: row 0 differs from token"),
        (
            {"transformers continuous": "broken"},
            "it ended with 1: RuntimeError: there are no eggs",
        ),
    ),
)
def test_what_does_not_serve_a_queue_is_not_timed(queue_of_fakes, peers, reason):
    from scripts._suites import serve

    *_, peer = serve.run(queue_of_fakes("right", peers))
    assert peer.side == "transformers continuous" and peer.reason.startswith(reason)
    assert not peer.seconds


def test_serving_a_queue_wrongly_ourselves_ends_the_run(queue_of_fakes):
    from scripts._suites import agree, serve

    with pytest.raises(agree.Wrong, match="in row 0 a token is 1.0e[+]00 std below"):
        list(serve.run(queue_of_fakes("wrong", {})))


def test_a_queue_has_more_prompts_than_rows_and_answers_of_many_lengths():
    from scripts._suites.workloads import QUEUE

    prompts, limits = QUEUE.prompts(100)
    lens = [len(prompt) for prompt in prompts]
    assert len(prompts) == len(limits) == QUEUE.num_prompts > QUEUE.num_rows
    assert 16 <= min(lens) < 32 and 200 < max(lens) <= QUEUE.longest_prompt
    assert 4 <= min(limits) < 16 and 128 < max(limits) <= QUEUE.longest_answer


def test_a_queue_is_served_alike_in_turn_and_batch_after_batch():
    from scripts._suites.ours import Ours
    from scripts._suites.shapes import CONFIGS

    side = Ours.of_random_weights("paged", CONFIGS["tiny"])
    prompts, limits = [[1, 2, 3], [4], [5, 6]], [3, 1, 2]
    made = side.serve(prompts, limits, 2, True)["tokens"]
    assert [len(row) for row in made] == limits
    assert side.serve(prompts, limits, 2, False)["tokens"] == made
    for prompt, limit, tokens in zip(prompts, limits, made, strict=True):
        assert side.run([], [prompt], limit, [])["tokens"] == [tokens]


def test_ours_being_wrong_ends_the_run(plan_of_fakes, monkeypatch, command_of_fake):
    from scripts._suites import agree, generate
    from scripts._suites.process import Process

    def ours(name, log, _):
        how = "wrong" if name == "contiguous" else "right"
        return Process(name, command_of_fake(how), log)

    monkeypatch.setattr(generate, "ours", ours)
    with pytest.raises(agree.Wrong, match="contiguous, tiny float32 2 x 3: row 0 differs"):
        list(generate.run(plan_of_fakes))


def test_a_side_that_is_silent_is_given_up(tmp_path, monkeypatch):
    from scripts._suites import process

    monkeypatch.setattr(process, "PATIENCE", 0.1)
    command = [sys.executable, "-c", "input()"]
    with process.Process("spam", command, tmp_path / "log") as side:
        with pytest.raises(process.Broken, match="it did not answer in 0 s"):
            side.ready()


def test_peers_are_made_to_share_the_memory(plan_of_fakes, monkeypatch):
    from scripts._suites import generate
    from scripts._suites.shapes import CONFIGS, num_weights

    names = list(plan_of_fakes.peers)
    assert generate._groups(plan_of_fakes, "tiny", "float32") == [names]
    four = 4 * 2.5 * num_weights(CONFIGS["tiny"]) * 4
    monkeypatch.setattr(generate, "memory_bytes", lambda: int(four) + 1)
    assert generate._groups(plan_of_fakes, "tiny", "float32") == [names[:2], names[2:]]
    alone = dataclasses.replace(plan_of_fakes, peers={})
    assert generate._groups(alone, "tiny", "float32") == [[]]


def test_only_what_ran_in_turn_is_compared(plan_of_fakes, monkeypatch):
    from scripts._suites import generate
    from scripts._suites.record import ratios_of

    monkeypatch.setattr(generate, "_groups", lambda *_: [["right"], ["tired"]])
    rows = list(generate.run(plan_of_fakes))
    assert [row.case for row in rows if row.side == "paged"] == [
        "tiny float32 2 x 3, beside right",
        "tiny float32 2 x 3, beside tired",
    ]
    found = ratios_of(rows, ("tok_s",), ("paged",))
    assert [x.other for x in found] == ["contiguous", "right", "contiguous"]


# --- Peers


def test_a_peer_is_there_if_its_environment_is(tmp_path):
    from scripts._suites.environments import command_of, ENVIRONMENTS, PEERS

    peer = PEERS["transformers static"]
    reason = "it is not installed; --install-peers does that"
    assert command_of(peer, tmp_path) == reason
    stamp = tmp_path / "peers" / "transformers" / "installed.json"
    stamp.parent.mkdir(parents=True)
    stamp.write_text(json.dumps({"requirements": [], "reason": "no eggs"}))
    assert command_of(peer, tmp_path) == "no eggs"
    stamp.write_text(json.dumps({"requirements": [["spam==1"]], "reason": ""}))
    reason = "it is installed in another version; --install-peers renews it"
    assert command_of(peer, tmp_path) == reason
    wanted = ENVIRONMENTS["transformers"].steps
    stamp.write_text(json.dumps({"requirements": wanted, "reason": ""}))
    python, *rest = command_of(peer, tmp_path)
    assert python == str(stamp.parent / "venv" / "bin" / "python")
    assert rest == ["-m", "scripts._suites.peers.hugging_face", "static"]


def test_a_peer_for_another_python_is_not_installed(tmp_path, monkeypatch):
    from scripts._suites import environments

    old = environments.Environment(((),), (1, 2))
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"old": old})
    reason = "it needs a Python from 3.1 to 3.2, and there is none here"
    assert environments.install("old", tmp_path) == reason


@pytest.mark.slow
def test_what_cannot_be_installed_leaves_its_reason(tmp_path, monkeypatch):
    from scripts._suites import environments

    # An install that fails before it asks for anything: there is no such option.
    bad = environments.Environment((("--no-such-option",),), (11, 20))
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"bad": bad})
    reason = environments.install("bad", tmp_path)
    log = tmp_path / "peers" / "bad" / "pip.log"
    assert reason == "it cannot be installed; peers/bad/pip.log says why"
    assert "no such option" in log.read_text()
    peer = environments.Peer("bad", "spam")
    assert environments.command_of(peer, tmp_path) == reason
