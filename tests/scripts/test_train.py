import hashlib
import json
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from models import load_checkpoint, load_tokenizer, tasks
from scripts import _corpus as corpora, train
from scripts._circuit import with_lookup_circuit
from scripts._evaluation import accuracy
from scripts._train_options import parse_options


FILES = {
    "config.json",
    "generation_config.json",
    "loss.png",
    "model.safetensors",
    "tokenizer.json",
}
SMALL = ("--context", "64", "--sample", "4", "--dtype", "float32")


@pytest.fixture(scope="module")
def corpus():
    return corpora.TaskCorpus()


def run(out, *arguments):
    train.main(["--out", str(out), *SMALL, *map(str, arguments)])


def weights(out):
    return safetensors.numpy.load_file(out / "model.safetensors")


def losses_told(text):
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


@pytest.mark.slow
def test_a_run_writes_a_checkpoint_and_a_drawing(tmp_path, capsys):
    out = tmp_path / "new" / "model"
    run(out, "--steps", 40)
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    first, last = losses_told(told)[0], losses_told(told)[-1]
    assert last < 0.8 * first
    assert "tokens/s" in told and "held-out look-ups in 64 tokens: " in told
    decoder, tokenizer = load_checkpoint(out), load_tokenizer(out)
    assert decoder.config.vocab_size == tokenizer.get_vocab_size()
    assert decoder.config.max_position_embeddings == 64
    generation = json.loads((out / "generation_config.json").read_text())
    assert tokenizer.encode("\n").ids[1] in generation["eos_token_id"]


def crash(*_):
    raise MemoryError


def interrupt_at(step, monkeypatch):
    batch = corpora.TaskCorpus.batch

    def interrupted(self, seed, at, stage):
        if at == step:
            signal.raise_signal(signal.SIGINT)
        return batch(self, seed, at, stage)

    monkeypatch.setattr(corpora.TaskCorpus, "batch", interrupted)


@pytest.mark.slow
def test_the_learnt_text_must_not_change(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h\n" * 50)
    options = ("--text", text, "--steps", 3, "--save-every", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "_write_checkpoint", crash)
        with pytest.raises(MemoryError):
            run(tmp_path, *options)
    capsys.readouterr()
    old, new = text.read_bytes(), b"a b c d e f g i\n" * 50
    assert len(new) == len(old)
    text.write_bytes(new)
    told = refusal(capsys, "--out", tmp_path, *SMALL, *options, "--resume")
    new, old = (hashlib.sha256(content).hexdigest() for content in (new, old))
    is_new, was_old = f"is a text of SHA-256 {new}", f"was a text of SHA-256 {old}"
    assert f"--text {is_new}, but {was_old} in the interrupted run" in told
    told = refusal(capsys, "--out", tmp_path, *SMALL, *options[2:], "--resume")
    assert f"--text is not given, but {was_old} in the interrupted run" in told
    # The same text may have moved.
    moved = tmp_path / "moved.txt"
    moved.write_text("a b c d e f g h\n" * 50)
    run(tmp_path, "--text", moved, *options[2:], "--resume")


@pytest.mark.slow
def test_a_state_of_another_version_is_refused(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        with pytest.raises(SystemExit):
            run(tmp_path, "--steps", 3)
    capsys.readouterr()
    path = tmp_path / "train_state.bin"
    head, _, rest = path.read_bytes()[:-32].partition(b"\n")
    notes = json.loads(head)
    options = notes["options"]
    others = (
        {**notes, "options": {name: options[name] for name in list(options)[1:]}},
        {**notes, "options": list(options)},
        {**notes, "more": 1},
        {},
    )
    for other in others:
        whole = json.dumps(other).encode() + b"\n" + rest
        path.write_bytes(whole + hashlib.sha256(whole).digest())
        told = refusal(capsys, "--out", tmp_path, *SMALL, "--steps", 3, "--resume")
        assert "is of another version" in told


@pytest.mark.slow
def test_a_damaged_state_is_refused(tmp_path, monkeypatch, capsys):
    options = ("--steps", 4, "--save-every", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train, "_write_checkpoint", crash)
        with pytest.raises(MemoryError):
            run(tmp_path, *options)
    capsys.readouterr()
    path = tmp_path / "train_state.bin"
    whole = path.read_bytes()
    head, _, rest = whole.partition(b"\n")
    notes = json.loads(head)
    heads = (
        [],
        {},
        {"options": notes["options"]},
        {**notes, "losses": ["x"] * 4},
        {**notes, "losses": [1.0] * 9},
    )
    damaged = [json.dumps(other).encode() + b"\n" + rest for other in heads]
    damaged += [b"", b"spam", b"\xff\n" + rest, head + b"\n", whole + b"\0"]
    damaged += [whole[:size] for size in (len(whole) // 2, len(whole) - 100)]
    monkeypatch.setattr(train, "_untrained", crash)
    for content in damaged:
        path.write_bytes(content)
        told = refusal(capsys, "--out", tmp_path, *SMALL, *options, "--resume")
        assert "is not what an interrupted run leaves" in told


@pytest.mark.slow
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, monkeypatch, capsys):
    run(tmp_path / "whole", "--steps", 9)
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(SystemExit) as ended:
            run(parts, "--steps", 9)
    assert ended.value.code == 128 + signal.SIGINT
    # The batch of step 5 is made while step 4 is learnt.
    assert re.search(r"--resume goes on after step [456]\n", capsys.readouterr().out)
    assert {path.name for path in parts.iterdir()} == {"train_state.bin"}
    run(parts, "--steps", 9, "--resume")
    assert {path.name for path in parts.iterdir()} == FILES
    expected, actual = weights(tmp_path / "whole"), weights(parts)
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(actual[name], weight)


@pytest.mark.slow
def test_a_state_that_is_saved_at_intervals_survives_a_crash(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "_write_checkpoint", crash)
        with pytest.raises(MemoryError):
            run(tmp_path, "--steps", 5, "--save-every", 2)
    state = tmp_path / "train_state.bin"
    assert len(json.loads(state.read_bytes().split(b"\n")[0])["losses"]) == 4
    run(tmp_path, "--steps", 5, "--resume")
    assert {path.name for path in tmp_path.iterdir()} == FILES


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        train.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("train: ")
    return told.err


@pytest.mark.parametrize(
    "arguments",
    (
        ("--steps", "0"),
        ("--steps", "ten"),
        ("--steps", "1_0"),
        ("--seed", "-1"),
        ("--context", "63"),
        ("--context", "4096"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "fast"),
        ("--dtype", "int8"),
        ("--save-every", "0"),
        ("--sample", "0"),
    ),
)
def test_a_bad_option_is_named_with_what_was_given(capsys, tmp_path, arguments):
    told = refusal(capsys, "--out", tmp_path / "out", *arguments)
    assert all(argument in told for argument in arguments)
    assert not (tmp_path / "out").exists()


def test_other_nonsense_is_told_in_one_line(capsys, tmp_path):
    assert "--spam" in refusal(capsys, "--spam")
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in refusal(capsys, "--out", file)
    out = ("--out", tmp_path / "out")
    assert "No such file" in refusal(capsys, *out, "--text", tmp_path / "none")
    assert "directory" in refusal(capsys, *out, "--text", tmp_path)
    assert "too short" in refusal(capsys, *out, "--text", file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(capsys, *out, "--text", file)
    assert not (tmp_path / "out").exists()
    assert "no interrupted run" in refusal(capsys, "--out", tmp_path, "--resume")


@pytest.mark.parametrize("name", ("/proc/x", "/proc", "/dev/null/x", "x" * 300))
def test_a_directory_that_cannot_be_written_is_refused_first(capsys, monkeypatch, name):
    monkeypatch.setattr(train, "_untrained", crash)
    assert f"--out {name}: " in refusal(capsys, "--out", name)


def test_an_interrupted_run_is_neither_lost_nor_changed(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        with pytest.raises(SystemExit):
            run(tmp_path, "--steps", 3)
    capsys.readouterr()
    options = ("--out", tmp_path, *SMALL)
    assert "--resume" in refusal(capsys, *options, "--steps", 3)
    told = refusal(capsys, *options, "--steps", 4, "--resume")
    assert "--steps is 4, but was 3 in the interrupted run" in told
    told = refusal(capsys, *options, "--steps", 3, "--seed", 1, "--resume")
    assert "--seed is 1, but was 0 in the interrupted run" in told


@pytest.mark.slow
def test_any_text_can_be_learnt(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog.\n" * 200)
    out = tmp_path / "out"
    run(out, "--text", text, "--steps", 30)
    assert {path.name for path in out.iterdir()} == FILES
    told = capsys.readouterr().out
    (held_out,) = re.findall(r"held-out loss a token: ([\d.]+)", told)
    assert float(held_out) < losses_told(told)[0]
    tokenizer = load_tokenizer(out)
    for sample in ("the lazy dog.\n", "Zürich\t 東京"):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert load_checkpoint(out).config.vocab_size == tokenizer.get_vocab_size()


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "scripts.train", "--steps", "none"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert (
        ended.stderr
        == "train: argument --steps: 'none' is no whole number from 1 to 10000000\n"
    )


# --- What is learnt from


def test_batches_follow_from_seed_and_step_alone(corpus):
    stage = corpus.stages[0]
    again = corpora.TaskCorpus().batch(3, 7, stage)
    other = corpus.batch(3, 8, stage)
    for rows, same, differ in zip(corpus.batch(3, 7, stage), again, other, strict=True):
        np.testing.assert_array_equal(rows.tokens, same.tokens)
        np.testing.assert_array_equal(rows.weights, same.weights)
        assert not np.array_equal(rows.tokens, differ.tokens)


@pytest.mark.parametrize("stage", (0, 2))
def test_only_answers_are_predicted_and_they_are_right(corpus, stage):
    stage = corpus.stages[stage]
    long, short = corpus.batch(0, 0, stage)
    assert long.tokens.shape == (stage.num_rows, stage.length)
    decode = corpus.tokenizer.decode
    known = dict(tasks.facts())
    for rows in (long, short):
        real = rows.weights > 0
        assert 0.2 < real.sum() / rows.tokens.size <= 0.6
        following = rows.positions[real] + 1
        inside = following % rows.tokens.shape[1] != 0
        flat = rows.tokens.reshape(-1)
        np.testing.assert_array_equal(flat[following[inside]], rows.targets[real][inside])
        for line in decode(list(short.tokens[0])).split("\n")[:-1]:
            if "?" in line:
                prompt, answer = line.split("?")
                assert known[prompt + "?"] == answer + "\n"
            else:
                numbers, answer = line.split("=")
                assert sum(map(int, numbers.split("+"))) == int(answer)


def test_questions_in_a_long_row_are_about_its_records(corpus):
    long, _ = corpus.batch(0, 1, corpus.stages[1])
    lines = corpus.tokenizer.decode(list(long.tokens[0])).split("\n")[:-1]
    records = dict(line.split("=") for line in lines if line[0].isalpha() and "=" in line)
    order = list(records)
    asked = 0
    for line in lines:
        key, mark, answer = line.partition("?" if "?" in line else ">")
        if key in records and mark == "?":
            assert records[key] == answer
            asked += 1
        elif key in records and mark == ">":
            assert order[order.index(key) + 1] == answer
            asked += 1
    assert asked > len(records) / 2


def test_the_circuit_is_only_a_beginning(corpus):
    # It leaves the shapes and the other layers as they are.
    options = parse_options([])
    decoder = train._untrained(corpus, options)
    again = with_lookup_circuit(decoder, seed=1)
    assert jax.tree.structure(again) == jax.tree.structure(decoder)
    for layer in (2, 3):
        pairs = zip(
            jax.tree.leaves(again.layers[layer]),
            jax.tree.leaves(decoder.layers[layer]),
            strict=True,
        )
        assert all(np.array_equal(a, b) for a, b in pairs)
    questions = [tasks.lookup(np.random.default_rng(0), 5)] * 3
    assert accuracy(decoder, corpus.tokenizer, questions) in (0.0, 1.0)
