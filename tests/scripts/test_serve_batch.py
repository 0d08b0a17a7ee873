import json
import signal

import equinox as eqx
import jax.numpy as jnp
import pytest

from ..helpers import count_compilations
from .test_generate import model_dir  # noqa: F401  a fixture


TEXTS = ("hello", "what is the world? it is", "a", "it is", "world " * 6, "b", "hello", "?")


@pytest.fixture
def serve(model_dir, tmp_path, capsys):  # noqa: F811
    """Runs a command line over a file, and returns its results, summary and stderr."""
    from scripts.serve_batch import main

    def _serve(lines, *arguments, name="prompts.txt", out="out"):
        file, folder = tmp_path / name, tmp_path / out
        file.write_text("\n".join(lines) + "\n")
        given = ["--model", str(model_dir), "--max-new-tokens", "12", "--rows", "3"]
        main([*given, "--prompts-file", str(file), "--out", str(folder), *arguments])
        shown = capsys.readouterr()
        assert shown.out == ""
        summary = json.loads((folder / "summary.json").read_text())
        return results_in(folder), summary, shown.err

    return _serve


def results_in(folder):
    return [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(model_dir):  # noqa: F811
    """The greedy tokens of each text by itself, from attention without a cache."""
    import models

    model, tokenizer = models.load_checkpoint(model_dir), models.load_tokenizer(model_dir)
    texts = sorted(set(TEXTS))
    known = [tokenizer.encode(text).ids for text in texts]
    lens = [len(tokens) for tokens in known]
    assert max(lens) <= 36

    @eqx.filter_jit
    def step(model, tokens, last):
        hidden = model.dense(tokens)[jnp.arange(len(last)), last]
        return model.unembed(hidden).argmax(axis=1)

    for _ in range(12):
        padded = jnp.array([tokens + [0] * (48 - len(tokens)) for tokens in known], "int32")
        last = jnp.array([len(tokens) - 1 for tokens in known])
        for tokens, new in zip(known, step(model, padded, last).tolist()):
            tokens.append(new)
    made = [tokens[n:] for tokens, n in zip(known, lens)]
    # Up to the token that ends a text.
    ends = [new.index(1) + 1 if 1 in new else 12 for new in made]
    return {text: new[:end] for text, new, end in zip(texts, made, ends)}


def test_each_prompt_is_continued_as_by_itself(serve, alone, tmp_path):
    results, summary, shown = serve(TEXTS, "--num-pages", "5", "--burst", "5")
    assert [result["index"] for result in results] == list(range(8))
    assert [result["prompt"] for result in results] == list(TEXTS)
    assert [result["tokens"] for result in results] == [alone[text] for text in TEXTS]
    assert summary["num_prompts"] == summary["num_finished"] == 8
    assert not summary["interrupted"]
    for name in ("num_prompt_tokens", "num_new_tokens"):
        assert summary[name] == sum(result[name] for result in results)
    speed = summary["num_new_tokens"] / summary["seconds"]
    assert summary["new_tokens_per_second"] == pytest.approx(speed)
    assert (summary["rows"], summary["num_pages"]) == (3, 5)
    assert 0 < summary["most_pages_used"] <= 5
    assert summary["peak_bytes"] > summary["cache_bytes"] == 2 * 5 * 16 * 16 * 4
    assert "8/8" in shown and "8 of 8 prompts" in shown
    folder = tmp_path / "out"
    assert (folder / "pages.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in folder.iterdir()}
    assert names == {"results.jsonl", "summary.json", "pages.png"}


def test_other_prompts_of_about_that_number_compile_nothing(serve, alone):
    options = "--num-pages", "5", "--burst", "5"
    serve(TEXTS, *options)
    with count_compilations() as compiled:
        results, _, _ = serve(TEXTS[:0:-1] + ("x",), *options, "--stop", "zzz")
    assert compiled == []
    assert results[0]["tokens"] == alone[TEXTS[-1]]


def test_a_line_says_how_its_prompt_is_continued(serve, alone):
    drawn = {"prompt": "hello", "temperature": 1.5, "seed": 7}
    lines = [
        json.dumps("hello"),
        json.dumps({"prompt": "hello", "max_new_tokens": 3}),
        json.dumps(drawn),
        json.dumps({**drawn, "seed": 8}),
        json.dumps({"prompt": "hello", "temperature": 1.5}),
        json.dumps(drawn),
    ]
    # More rows than prompts. A page of 16 tokens of one layer takes 2 KiB.
    options = "--rows", "9", "--memory", "1"
    results, summary, _ = serve(lines, *options, name="prompts.jsonl")
    assert (summary["rows"], summary["num_pages"]) == (6, 512)
    tokens = [result["tokens"] for result in results]
    assert tokens[0] == alone["hello"] and tokens[1] == alone["hello"][:3]
    assert results[1]["finish_reason"] == "length"
    assert tokens[2] == tokens[5]
    assert len({tuple(x) for x in (tokens[0], tokens[2], tokens[3], tokens[4])}) == 4
    # The draws of a line without a seed are those of the command line's and its index.
    others, _, _ = serve(lines[::-1], *options, "--seed", "1", name="prompts.jsonl")
    assert others[3]["tokens"] == tokens[2] and others[1]["tokens"] != tokens[4]


def test_a_stop_text_ends_a_prompt(serve, alone, model_dir):  # noqa: F811
    import models

    text = models.load_tokenizer(model_dir).decode(alone["hello"])
    stop = text[3:6]
    results, _, _ = serve(TEXTS, "--num-pages", "5", "--burst", "5", "--stop", stop)
    assert results[0]["text"] == results[6]["text"] == text[: text.index(stop)]
    assert results[0]["finish_reason"] == "stop"
    assert results[0]["tokens"] == alone["hello"][: results[0]["num_new_tokens"]]


@pytest.fixture
def heeded():
    """SIGINT as at a terminal: a shell that runs the tests in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_keeps_what_is_finished(serve, alone, tmp_path, monkeypatch, heeded):
    from scripts import serve_batch

    whole = serve_batch.serve

    def interrupted(*arguments):
        for burst in whole(*arguments):
            if burst.finished:
                signal.raise_signal(signal.SIGINT)
            yield burst

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(serve_batch, "serve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        serve(TEXTS, "--num-pages", "5", "--burst", "5")
    assert signal.getsignal(signal.SIGINT) is before
    results = results_in(tmp_path / "out")
    assert 0 < len(results) < 8
    for result in results:
        assert result["tokens"] == alone[TEXTS[result["index"]]]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["interrupted"] and summary["num_finished"] == len(results)
    assert (tmp_path / "out" / "pages.png").exists()


def test_results_are_there_as_they_finish_and_in_order_at_the_end(tmp_path):
    from scripts._serve_output import Results

    path = tmp_path / "results.jsonl"

    def write(fail):
        with Results(path) as results:
            results.add(2, {"text": "c"})
            results.add(0, {"text": "a"})
            assert [x["index"] for x in results_in(tmp_path)] == [2, 0]
            if fail:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(fail=True)
    assert [x["index"] for x in results_in(tmp_path)] == [2, 0]
    write(fail=False)
    assert results_in(tmp_path) == [{"index": 0, "text": "a"}, {"index": 2, "text": "c"}]


def refused(*arguments, says, lines=("hello",), name="prompts.txt"):
    return pytest.param(lines, name, arguments, says, id=says)


def json_lines(*lines, says):
    return refused(lines=lines, name="prompts.jsonl", says=says)


@pytest.mark.parametrize(
    "lines, name, arguments, says",
    (
        refused(lines=("", "  "), says="has no prompt in it"),
        refused("--num-pages", "2", lines=("a", "hello" * 40), says="but the pool has 2"),
        refused(lines=("a", "", "hello" * 200), says="the prompt of line 3 has"),
        refused("--max-new-tokens", "127", says="more than the 128 that the model reads"),
        refused("--rows", "0", says="'0' is no whole number from 1"),
        refused("--num-pages", "9", "--memory", "9", says="not allowed with argument"),
        refused("--page-size", "12", says="12 (choose from 8, 16"),
        refused("--out", "/dev/null", says="is a file, not a directory"),
        refused("--out", "/proc/x", says="--out /proc/x: "),
        refused("--model", "/no/such", says="/no/such"),
        json_lines('"a"', "{", says="line 2 of"),
        json_lines("3", says="neither a string nor an object"),
        json_lines('{"text": "a"}', says="neither a string nor an object with `prompt`"),
        json_lines('{"prompt": "a", "top_k": 3}', says="'top_k' is none of prompt, max"),
        json_lines('{"prompt": ""}', says="an empty text"),
        json_lines('{"prompt": "a", "seed": true}', says="seed: True is no number"),
        json_lines('{"prompt": "a", "seed": -1}', says="seed: '-1' is no whole number"),
        json_lines(
            '{"prompt": "a", "temperature": NaN}', says="temperature: must be 0, or"
        ),
        json_lines('{"prompt": "a", "max_new_tokens": 0}', says="max_new_tokens: '0' is"),
    ),
)
def test_what_cannot_be_done_is_refused_in_one_line(
    serve, capsys, monkeypatch, tmp_path, lines, name, arguments, says
):
    import models

    monkeypatch.delattr(models.Checkpoint, "load")
    with pytest.raises(SystemExit) as error:
        serve(lines, *arguments, name=name)
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and says in shown.err
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_pool_beyond_the_memory_is_refused(serve, capsys, monkeypatch):
    from scripts import serve_batch

    with pytest.raises(SystemExit):
        monkeypatch.setattr(serve_batch, "free_memory", lambda: 1000)
        serve(["a"])
    assert "there is room for 0 pages" in capsys.readouterr().err
