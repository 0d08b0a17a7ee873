import io
import itertools
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import decoders, models as bpe, pre_tokenizers, processors, Tokenizer
from tokenizers.trainers import BpeTrainer

from ..helpers import count_compilations


PROMPTS = ("hello", "what is the world? it is", "a")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A small random model: no answer is right, but each is reproducible."""
    import models

    folder = tmp_path_factory.mktemp("model")
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = models.DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=(1,),
    )
    models.save_checkpoint(models.Decoder(config, key=jax.random.key(3)), folder)
    return folder


def _tokenizer():
    tokenizer = Tokenizer(bpe.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROMPTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return tokenizer


@pytest.fixture
def generate(model_dir, capsys):
    """Runs a command line in this process, and returns what it wrote."""
    from scripts.generate import main

    def _generate(*arguments):
        main(["--model", str(model_dir), "--max-new-tokens", "12", *arguments])
        return capsys.readouterr()

    return _generate


@pytest.fixture
def report(generate):
    """As `generate`, with `--json`, which is read."""
    return lambda *arguments: json.loads(generate("--json", *arguments).out)


def prompts(*texts):
    return [part for text in texts for part in ("--prompt", text)]


@pytest.fixture(scope="module")
def greedy_tokens(model_dir):
    """Greedy continuations by recomputing everything for each token, without a cache."""
    import models

    model = models.load_checkpoint(model_dir)
    tokenizer = models.load_tokenizer(model_dir)
    forward = jax.jit(lambda tokens: model.unembed(model.dense(tokens)[0]))

    def _greedy_tokens(prompt, count):
        tokens = tokenizer.encode(prompt).ids
        num_known = len(tokens)
        while len(tokens) < num_known + count:
            padded = np.zeros((1, 128), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(jnp.argmax(forward(padded)[len(tokens) - 1])))
            if tokens[-1] == 1:
                break
        return tokens[num_known:]

    return _greedy_tokens


@pytest.mark.slow
def test_each_prompt_is_continued_as_by_full_recomputation(report, greedy_tokens):
    results = report(*prompts(*PROMPTS))["results"]
    for prompt, result in zip(PROMPTS, results):
        assert result["prompt"] == prompt
        assert result["tokens"] == greedy_tokens(prompt, 12)


def test_a_prompt_is_continued_alone_as_among_others(report):
    together = report(*prompts(*PROMPTS))["results"]
    alone = report(*prompts(PROMPTS[1]))["results"]
    assert alone[0]["text"] == together[1]["text"]


def test_the_json_adds_up(report):
    made = report(*prompts(*PROMPTS), "--page-size", "8")
    results = made["results"]
    for name in ("num_prompt_tokens", "num_new_tokens"):
        assert made[name] == sum(result[name] for result in results)
    for result in results:
        assert result["num_new_tokens"] == len(result["tokens"]) <= 12
        held = result["num_prompt_tokens"] + result["num_new_tokens"] - 1
        assert len(result["pages"]) == -(-held // 8)
    pages = [page for result in results for page in result["pages"]]
    assert made["pages_used"] == len(pages) == len(set(pages)) <= made["num_pages"]
    assert made["page_size"] == 8
    # One layer of keys and values, one head of 16 float32.
    assert made["cache_bytes"] == 2 * made["num_pages"] * 8 * 16 * 4
    assert made["peak_bytes"] > made["cache_bytes"]
    assert made["prefill_tokens_per_second"] > 0
    assert made["decode_tokens_per_second"] > 0


@pytest.fixture
def model_without_bos(model_dir, tmp_path):
    """As `model_dir`, but its tokenizer puts nothing before a prompt, whatever first token
    the configuration names, and blanks around a prompt go."""
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    file = tmp_path / "tokenizer.json"
    change = {"post_processor": None, "normalizer": strip}
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return str(tmp_path)


def test_only_the_tokenizer_puts_a_token_before_a_prompt(report, model_without_bos):
    """Not the configuration, though it names one."""
    made = report(*prompts("a"), "--model", model_without_bos)
    assert made["num_prompt_tokens"] == 1
    assert made["num_new_tokens"] > 0


def test_a_prompt_without_tokens_is_refused(generate, capsys, model_without_bos):
    with pytest.raises(SystemExit) as error:
        generate(*prompts("a", " "), "--model", model_without_bos)
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "prompt 2 has no tokens" in shown


def test_text_is_the_decoded_tokens(report, model_dir):
    import models

    tokenizer = models.load_tokenizer(model_dir)
    for result in report(*prompts(*PROMPTS))["results"]:
        assert result["text"] == tokenizer.decode(result["tokens"])


def test_stream_shows_the_text_that_is_printed_without(generate):
    for texts in (PROMPTS, PROMPTS[:1]):
        plain = generate(*prompts(*texts)).out
        assert generate(*prompts(*texts), "--stream").out == plain


def test_stream_looks_at_each_token(generate, monkeypatch):
    from scripts import generate as script

    shown = []

    def show(_, progress):
        shown.append(len(progress.tokens[0]))

    monkeypatch.setattr(script.Stream, "show", show)
    generate(*prompts(PROMPTS[0]), "--stream")
    assert shown == list(range(1, 13))


def test_stdout_is_json_alone_whatever_else_is_shown(generate):
    shown = generate(*prompts(*PROMPTS), "--json", "--stream", "--show-pages")
    texts = [result["text"] for result in json.loads(shown.out)["results"]]
    assert all(text in shown.err for text in texts)
    assert "pages of 16 tokens" in shown.err


def test_a_stop_text_of_several_tokens_ends_a_continuation(report):
    whole = report(*prompts(PROMPTS[0]))["results"][0]
    stop = whole["text"][3:6]
    cut = report(*prompts(PROMPTS[0]), "--stop", "never", "--stop", stop)["results"][0]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["tokens"] == whole["tokens"][: len(cut["tokens"])]
    assert len(cut["tokens"]) < len(whole["tokens"])
    # What was made past the stop is not in the cache.
    assert len(cut["pages"]) == 1


def test_only_tokens_that_are_kept_count_as_decoded(report, monkeypatch):
    from scripts import _engine

    whole = report(*prompts(PROMPTS[0]))["results"][0]
    # Each call of a program takes a second.
    clock = types.SimpleNamespace(perf_counter=map(float, itertools.count()).__next__)
    monkeypatch.setattr(_engine, "time", clock)
    made = report(*prompts(PROMPTS[0]), "--stop", whole["text"][3:6])
    # The prompt's last token makes the first.
    assert made["decode_tokens_per_second"] == made["num_new_tokens"] - 1 < 7


def test_a_continuation_without_an_end_ends_at_the_length(report):
    result = report(*prompts(PROMPTS[0]))["results"][0]
    assert result["finish_reason"] == "length" and result["num_new_tokens"] == 12


def test_the_seed_decides_the_draws_and_nothing_else(report):
    def text(*arguments):
        return report(*prompts(PROMPTS[0]), *arguments)["results"][0]["text"]

    warm = "--temperature", "1.5"
    assert text(*warm, "--seed", "1") == text(*warm, "--seed", "1")
    assert text(*warm, "--seed", "1") != text(*warm, "--seed", "2")
    assert text("--seed", "1") == text("--seed", "2")
    # A low temperature takes the likeliest token.
    assert text("--temperature", "0.001", "--seed", "1") == text()


def test_pages_are_drawn_as_the_json_tells(generate):
    shown = generate(*prompts(*PROMPTS), "--json", "--show-pages", "--page-size", "8")
    made = json.loads(shown.out)
    lines = [line for line in shown.err.splitlines() if " | " in line]
    pool = "".join(lines[: -len(PROMPTS)][0].split(" | ")[1].split())
    for row, result in enumerate(made["results"]):
        pages = [page for page, mark in enumerate(pool) if mark == str(row)]
        assert pages == sorted(result["pages"])
    assert pool.count(".") == made["num_pages"] - made["pages_used"]


def test_other_prompts_of_about_that_size_compile_nothing(generate):
    generate(*prompts(*PROMPTS))
    others = prompts("a", "hello" * 5, "it")
    with count_compilations() as compiled:
        generate(*others, "--max-new-tokens", "15", "--stop", "x", "--stop", "yz")
    assert compiled == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_dtype_is_that_of_weights_and_cache(report, dtype):
    made = report(*prompts("hello"), "--dtype", dtype)
    assert made["dtype"] == dtype
    itemsize = jnp.dtype(dtype).itemsize
    assert made["cache_bytes"] == 2 * made["num_pages"] * 16 * 16 * itemsize


def test_prompts_come_from_files_too(report, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_bytes("\ufeffhello\r\n\n a\u2028b\n".encode())
    strings = tmp_path / "prompts.jsonl"
    strings.write_text('"two\\nlines"\n\n"hello"\n"a"\n')

    def read(*arguments):
        return [result["prompt"] for result in report(*arguments)["results"]]

    assert read(*prompts("a"), "--prompts-file", str(lines)) == [
        "a",
        "hello",
        " a\u2028b",
    ]
    assert read("--prompts-file", str(strings)) == ["two\nlines", "hello", "a"]


def nonsense(*arguments, says):
    return pytest.param(arguments, says, id=" ".join(arguments)[:40] or "nothing")


@pytest.mark.parametrize(
    "arguments, says",
    [
        nonsense(says="give at least one --prompt"),
        nonsense("--prompt", "", says="empty"),
        nonsense("--prompt", "\udcff", says="UTF-8"),
        nonsense("--prompt", "a", "--stop", "", says="empty"),
        nonsense("--prompt", "a", "--max-new-tokens", "0", says="'0' is no whole number"),
        nonsense("--prompt", "a", "--max-new-tokens", "-3", says="'-3' is no whole number"),
        nonsense("--prompt", "a", "--max-new-tokens", "x", says="'x' is no whole number"),
        nonsense("--prompt", "a", "--max-new-tokens", "1_0", says="no whole number"),
        nonsense("--prompt", "a", "--max-new-tokens", " 3 ", says="no whole number"),
        nonsense("--prompt", "a", "--max-new-tokens", "\u0663", says="no whole number"),
        nonsense("--prompt", "a", "--max-new-tokens", "128", says="below 128"),
        nonsense("--prompt", "a" * 200, says="it may have at most 116"),
        nonsense("--prompt", "a" * 200, "--max-len", "90", says="it may have at most 89"),
        nonsense("--prompt", "a", "--max-len", "129", says="at most 128"),
        nonsense("--prompt", "a", "--max-len", "1", says="'1' is no whole number from 2"),
        nonsense("--prompt", "a", "--system", "b", says="only with --chat"),
        nonsense("--chat", says="argument --chat"),
        nonsense("--prompt", "a", "--model", "", says="empty"),
        nonsense("--prompt", "a", "--page-size", "12", says="12 (choose from 8, 16, 32"),
        nonsense("--prompt", "a", "--page-size", "4", says="4 (choose from 8, 16, 32"),
        nonsense("--prompt", "a", "--page-size", "512", says="512 (choose from 8, 16, 32"),
        nonsense("--prompt", "a", "--dtype", "int8", says="float32"),
        nonsense("--prompt", "a", "--temperature", "-1", says="0.001 to 1000"),
        nonsense("--prompt", "a", "--temperature", "nan", says="0.001 to 1000"),
        nonsense("--prompt", "a", "--seed", "-1", says="'-1' is no whole number from 0"),
        nonsense("--prompt", "a", "--model", "/no/such", says="/no/such"),
        nonsense("--prompts-file", "/no/such", says="No such file"),
        nonsense("--prompts-file", "/", says="directory"),
        nonsense("--prom", "a", says="--prom"),
        nonsense("--prompt", says="--prompt"),
        nonsense("--frobnicate", says="--frobnicate"),
    ],
)
def test_nonsense_is_refused_in_one_line(generate, capsys, arguments, says):
    with pytest.raises(SystemExit) as error:
        generate(*arguments)
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and says in shown.err


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("empty.txt", b"", "no prompt"),
        ("blank.txt", b"\n \r\n", "no prompt"),
        ("latin.txt", "stra\u00dfe".encode("latin-1"), "not UTF-8 (byte 4)"),
        ("numbers.jsonl", b'"a"\n3\n', "not a JSON string: 3"),
        ("broken.jsonl", b'"a\n', "not a JSON string"),
        ("blank.jsonl", b'""\n', "empty"),
        ("deep.jsonl", b"[" * 200_000, "not a JSON string: [[["),
    ],
)
def test_a_file_without_prompts_is_refused(generate, capsys, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as error:
        generate("--prompts-file", str(tmp_path / name))
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and says in shown


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", "tokenizer.json"))
@pytest.mark.parametrize("content", (None, b"", b"{}"))
def test_a_broken_model_is_refused(generate, capsys, tmp_path, model_dir, name, content):
    for file in model_dir.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
        elif content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as error:
        generate("--model", str(tmp_path), "--prompt", "a")
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--model" in shown


def test_a_model_whose_files_do_not_fit_together_is_refused(
    generate, capsys, tmp_path, model_dir
):
    for name, spoil, says in SPOILT:
        directory = tmp_path / name
        directory.mkdir()
        for file in model_dir.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        spoil(directory)
        with pytest.raises(SystemExit) as error:
            generate("--model", str(directory), "--prompt", "a")
        assert error.value.code == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1, name
        assert says in shown.err and str(directory) in shown.err, name


def _truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _misshaped(directory):
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.norm.weight"] = np.ones(33, np.float32)
    safetensors.numpy.save_file(tensors, path)


def _without_shards(directory):
    (directory / "model.safetensors").unlink()
    weight_map = {"model.norm.weight": "b.safetensors", "lm_head.weight": "a.safetensors"}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def _with_key(directory):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rotary_magic": 3}))


def _without_tokenizer(directory):
    (directory / "tokenizer.json").unlink()


SPOILT = (
    ("truncated", _truncated, "model.safetensors: not a safetensors file"),
    ("misshaped", _misshaped, "model.norm.weight is (33,), not (32,)"),
    ("shards", _without_shards, "no such weight file: a.safetensors, b.safetensors"),
    ("key", _with_key, "config.json: rotary_magic 3 is not supported"),
    ("tokenizer", _without_tokenizer, "tokenizer.json: no such file"),
)


def test_a_cache_beyond_the_memory_is_refused(generate, capsys, monkeypatch):
    import models
    from scripts import _memory

    monkeypatch.setattr(_memory, "free_memory", lambda: 1000)
    monkeypatch.delattr(models.Checkpoint, "load")
    with pytest.raises(SystemExit) as error:
        generate("--prompt", "a")
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "of memory are free" in shown


def test_a_row_ends_where_it_is_as_long_as_asked_for(report):
    whole = report(*prompts(*PROMPTS))["results"]
    longest = whole[1]["num_prompt_tokens"] + 3
    for result, cut in zip(
        whole, report(*prompts(*PROMPTS), "--max-len", str(longest))["results"]
    ):
        room = min(12, longest - cut["num_prompt_tokens"])
        assert cut["tokens"] == result["tokens"][:room]
        assert cut["finish_reason"] == "length"


def test_the_program_itself_ends_with_status_2_and_no_traceback():
    command = [sys.executable, "-m", "scripts.generate", "--page-size", "7"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == "" and ended.stderr.count("\n") == 1


def test_what_stdout_cannot_show_is_escaped(generate, monkeypatch):
    from scripts import generate as script

    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    script._ready_streams()
    generate(*prompts("h\u00e9llo", "a"))
    sys.stdout.flush()
    assert shown.getvalue().startswith(b"[0] h\\xe9llo\n")


def test_a_closed_stderr_is_done_without(generate, monkeypatch):
    from scripts import generate as script

    monkeypatch.setattr(sys, "stderr", None)
    script._ready_streams()
    with sys.stderr:
        assert json.loads(generate(*prompts("a"), "--json").out)["num_new_tokens"] > 0


def run_program(model_dir, redirection):
    """Runs the program with its output redirected by the shell."""
    command = [sys.executable, "-m", "scripts.generate", "--model", str(model_dir)]
    command += ["--max-new-tokens", "2", "--prompt", "a", "--json"]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command],
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no full device")
def test_a_full_device_ends_in_one_line(model_dir):
    ended = run_program(model_dir, ">/dev/full")
    assert ended.returncode == 1
    assert ended.stderr == "generate: cannot write: No space left on device\n"


def test_a_closed_stdout_is_refused(model_dir):
    ended = run_program(model_dir, ">&-")
    assert (ended.returncode, ended.stderr) == (2, "generate: stdout is closed\n")
