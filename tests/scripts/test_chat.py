"""Conversations: what is read of each turn, and that the answers are as from scratch."""

import io
import json
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import models as vocabularies, pre_tokenizers, Tokenizer

from ..helpers import quick_jit


SPECIAL = ("<bos>", "<end>", "<user>", "<model>", "<system>")
WORDS = tuple(f"w{number}" for number in range(60))
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<model>' if message.role =="
    " 'assistant' else '<' + message.role + '>' }} {{ message.content }} <end>"
    "{% endfor %}{{ '<model> ' if add_generation_prompt }}"
)
# As some reasoning models' do, this one leaves an earlier answer's first word out.
FORGETFUL = TEMPLATE.replace(
    "{{ message.content }}",
    "{{ message.content if message.role == 'user' else message.content[3:] }}",
)
END = SPECIAL.index("<end>")
# As many tokens as the least of a cache's rows may have.
MAX_LEN = 128
TURNS = ("w1 w2 w3", "w4", "w5 w6")


def _random(decoder, config):
    """A decoder that says words only. Its weights are from NumPy, since JAX would compile
    a program for each shape.
    """
    shapes = jax.eval_shape(lambda key: decoder(config, key=key), jax.random.key(0))
    rng = np.random.default_rng(3)
    made = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.3, jnp.float32), shapes
    )
    silent = made.lm_head.weight.at[: len(SPECIAL)].set(0)
    return eqx.tree_at(lambda d: d.lm_head.weight, made, silent)


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """A small random model whose answers are words, so that a text is cut into the tokens
    that it was made of."""
    import models

    folder = tmp_path_factory.mktemp("chat")
    vocabulary = {word: token for token, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(vocabularies.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = models.DecoderConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=MAX_LEN,
        bos_token_id=0,
        eos_token_id=(),
    )
    models.save_checkpoint(_random(models.Decoder, config), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    return folder


@pytest.fixture
def changed(chat_dir, tmp_path):
    """A copy of the model, with some files changed."""

    def _changed(**contents):
        for file in chat_dir.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        for name, content in contents.items():
            suffix = "jinja" if name == "chat_template" else "json"
            (tmp_path / f"{name}.{suffix}").write_text(content)
        return tmp_path

    return _changed


@pytest.fixture
def chat(capsys):
    """Runs a chat in this process, and returns what it wrote."""
    from scripts.generate import main

    def _chat(directory, turns, *arguments):
        given = [part for turn in turns for part in ("--prompt", turn)]
        common = ("--model", str(directory), "--chat", "--max-new-tokens", "6")
        main([*common, *given, *arguments])
        return capsys.readouterr()

    return _chat


@pytest.fixture
def results(chat):
    """As `chat`, with `--json`, of which the turns' results are returned."""
    return lambda *arguments: json.loads(chat(*arguments, "--json").out)["results"]


def refusal(capsys, chat, *arguments):
    with pytest.raises(SystemExit) as error:
        chat(*arguments)
    assert error.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


@pytest.fixture(scope="module")
def answer_from_scratch(chat_dir):
    """Greedy answers by recomputing everything for each token, without a cache."""
    import models

    model = models.load_checkpoint(chat_dir)
    forward = quick_jit(lambda tokens: model.unembed(model.dense(tokens)[0]))

    def _answer(prompt, count):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            padded = np.zeros((1, 128), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(jnp.argmax(forward(padded)[len(tokens) - 1])))
        return tokens[len(prompt) :]

    return _answer


def rendered(results, turn, forgetful=False):
    """The tokens of a conversation up to where the answer of a turn begins."""
    texts = ["<bos>"]
    for past in results[:turn]:
        answer = past["text"][3:] if forgetful else past["text"]
        texts.append(f"<user> {past['prompt']} <end> <model> {answer} <end>")
    texts.append(f"<user> {results[turn]['prompt']} <end> <model>")
    return [(*SPECIAL, *WORDS).index(word) for word in " ".join(texts).split()]


def test_each_answer_is_as_from_scratch(results, chat_dir, answer_from_scratch):
    made = results(chat_dir, TURNS)
    assert [result["prompt"] for result in made] == list(TURNS)
    for turn, result in enumerate(made):
        prompt = rendered(made, turn)
        assert result["num_prompt_tokens"] == len(prompt)
        assert result["tokens"] == answer_from_scratch(prompt, 6)


def test_a_turn_reads_only_its_own_text(results, chat_dir, monkeypatch):
    from scripts._prefill import Prefill

    read = []
    first_tokens = Prefill.first_tokens

    def count(self, unread, cache):
        read.append(sum(map(len, unread)))
        return first_tokens(self, unread, cache)

    monkeypatch.setattr(Prefill, "first_tokens", count)
    made = results(chat_dir, TURNS)
    per_turn = []
    for turn, result in enumerate(made):
        held = len(rendered(made, turn - 1)) + 6 - 1 if turn else 0
        assert result["num_cached_tokens"] == held
        per_turn.append(result["num_prompt_tokens"] - held)
    # The last token of an answer, its end, the new words and two marks around them.
    assert per_turn[1:] == [1 + 1 + 1 + 1 + 2, 1 + 1 + 1 + 2 + 2]
    assert read == per_turn


def test_an_answers_tokens_stay_those_that_were_made(results, changed, chat_dir):
    """Also where its text would be cut into others: here its words become unknown."""
    tokenizer = json.loads((chat_dir / "tokenizer.json").read_text())
    tokenizer["decoder"] = {"type": "Replace", "pattern": {"String": "w"}, "content": "x"}
    plain = results(chat_dir, TURNS)
    made = results(changed(tokenizer=json.dumps(tokenizer)), TURNS)
    assert made[0]["text"] == plain[0]["text"].replace("w", "x").replace(" ", "")
    for name in ("tokens", "num_prompt_tokens", "num_cached_tokens"):
        assert [turn[name] for turn in made] == [turn[name] for turn in plain]


def test_a_special_token_within_an_answer_is_kept_but_not_shown(
    results, chat, changed, chat_dir
):
    plain = results(chat_dir, TURNS)
    stray = plain[0]["text"].split()[2]
    # Named by this file alone, in which transformers finds it too.
    config = {"bos_token": "<bos>", "mask_token": stray}
    directory = changed(tokenizer_config=json.dumps(config))
    made = results(directory, TURNS)
    for name in ("tokens", "num_prompt_tokens", "num_cached_tokens"):
        assert [turn[name] for turn in made] == [turn[name] for turn in plain]
    texts = []
    for before, after in zip(plain, made, strict=True):
        texts.append(" ".join(x for x in before["text"].split() if x != stray))
        assert after["text"] == texts[-1]
    assert chat(directory, TURNS, "--stream").out == "".join(f"{x}\n" for x in texts)


def test_a_template_that_rewrites_what_was_said_is_followed(
    results, changed, answer_from_scratch
):
    made = results(changed(chat_template=FORGETFUL), TURNS)
    for turn, result in enumerate(made):
        prompt = rendered(made, turn, forgetful=True)
        assert result["num_prompt_tokens"] == len(prompt)
        assert result["tokens"] == answer_from_scratch(prompt, 6)
    # Only what comes before the word left out is kept.
    assert made[1]["num_cached_tokens"] == made[0]["num_prompt_tokens"]


@pytest.mark.parametrize("form", ("{}", "[4, {}]"))
def test_the_tokens_that_end_an_answer_are_the_generation_configs(
    results, changed, chat_dir, answer_from_scratch, form
):
    whole = results(chat_dir, TURNS[:2])
    end = whole[0]["tokens"][2]
    settings = '{"eos_token_id": ' + form.format(end) + "}"
    first, second = results(changed(generation_config=settings), TURNS[:2])
    expected = whole[0]["tokens"]
    assert first["tokens"] == expected[: expected.index(end) + 1]
    assert first["finish_reason"] == "stop"
    prompt = rendered([first, second], 1)
    assert second["num_prompt_tokens"] == len(prompt)
    assert second["tokens"][0] == answer_from_scratch(prompt, 1)[0]


def test_the_end_that_a_model_makes_is_the_one_that_the_template_writes(
    results, changed, chat_dir, answer_from_scratch
):
    def prompt(end):
        return [0, SPECIAL.index("<user>"), 6, 7, 8, end, SPECIAL.index("<model>")]

    # A word with which the model answers a question that ends with it.
    words = range(len(SPECIAL), len(SPECIAL) + len(WORDS))
    answers = {word: answer_from_scratch(prompt(word), 6) for word in words}
    end = next(word for word, answer in answers.items() if word in answer[1:])
    answer = answers[end][: answers[end].index(end) + 1]
    tokenizer = json.loads((chat_dir / "tokenizer.json").read_text())
    content = WORDS[end - len(SPECIAL)]
    like = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"].append({**like, "id": end, "content": content})
    directory = changed(
        tokenizer=json.dumps(tokenizer),
        chat_template=TEMPLATE.replace("<end>", content),
        generation_config=json.dumps({"eos_token_id": end}),
    )
    first, second = results(directory, TURNS[:2])
    assert first["tokens"] == answer and first["finish_reason"] == "stop"
    whole = [*prompt(end), *answer, SPECIAL.index("<user>"), 9, end, 3]
    assert second["num_prompt_tokens"] == len(whole)
    assert second["num_cached_tokens"] == len(prompt(end)) + len(answer) - 1
    assert second["tokens"][0] == answer_from_scratch(whole, 1)[0]


@pytest.mark.parametrize("ends", ("65", "-1", '"w"', "[3, 65]", "true", "{}"))
def test_ends_that_the_model_does_not_have_are_refused(capsys, chat, changed, ends):
    directory = changed(generation_config='{"eos_token_id": ' + ends + "}")
    said = refusal(capsys, chat, directory, TURNS)
    assert "generation_config.json: eos_token_id" in said


def test_without_ends_of_its_own_the_configurations_are_used(results, changed, chat_dir):
    plain = results(chat_dir, TURNS[:1])
    assert results(changed(generation_config='{"do_sample": true}'), TURNS[:1]) == plain


def test_the_system_message_comes_first(results, chat_dir):
    plain, told = (
        results(chat_dir, TURNS[:2], *more) for more in ((), ("--system", "w9 w8"))
    )
    for before, after in zip(plain, told):
        assert after["num_prompt_tokens"] == before["num_prompt_tokens"] + 4


def test_turns_come_from_stdin_too(chat, chat_dir, monkeypatch):
    given = chat(chat_dir, TURNS)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2 w3\n\n  \nw4\r\nw5 w6"))
    assert chat(chat_dir, ()).out == given.out
    assert given.out.count("\n") == len(TURNS)


def test_stream_shows_the_answers_that_are_printed_without(chat, chat_dir):
    assert chat(chat_dir, TURNS, "--stream").out == chat(chat_dir, TURNS).out


def test_a_stop_text_ends_an_answer(results, chat_dir, answer_from_scratch):
    whole = results(chat_dir, TURNS[:2])
    words = whole[0]["text"].split()
    stop = f"{words[2]} {words[3]}"
    first, second = results(chat_dir, TURNS[:2], "--stop", stop)
    assert first["text"] == whole[0]["text"][: whole[0]["text"].index(stop)]
    prompt = rendered([first, second], 1)
    assert second["tokens"] == answer_from_scratch(prompt, 6)[: len(second["tokens"])]


@pytest.mark.parametrize("stream", ((), ("--stream",)), ids=("bursts", "stream"))
def test_room_that_is_made_in_vain_does_not_choose_the_long_factors(
    results, chat_dir, tmp_path, stream
):
    import models

    for file in chat_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((chat_dir / "config.json").read_text())
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 4 * i for i in range(8)]}
    changes = {
        **{"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]},
        **{"max_position_embeddings": 384, "original_max_position_embeddings": 96},
        **{"rope_parameters": None, "rope_scaling": {"type": "longrope", **factors}},
    }
    config = models.DecoderConfig.from_dict({**config, **changes})
    model = _random(models.Decoder, config)
    models.save_checkpoint(model, tmp_path)
    made = results(tmp_path, TURNS[:1], "--max-len", "96", *stream)
    tokens = rendered(made, 0)
    forward = quick_jit(lambda tokens: model.unembed(model.dense(tokens)[0]))
    for token in made[0]["tokens"]:
        # As long as short rows may be.
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(tokens)] = tokens
        assert token == int(jnp.argmax(forward(padded)[len(tokens) - 1]))
        tokens.append(token)


def test_the_pages_at_the_end_hold_the_conversation_but_its_last_token(chat, chat_dir):
    made = json.loads(chat(chat_dir, TURNS, "--json").out)
    last = made["results"][-1]
    held = last["num_prompt_tokens"] + last["num_new_tokens"] - 1
    assert made["pages_used"] == len(last["pages"]) == -(-held // 16)
    assert made["num_cached_tokens"] == sum(x["num_cached_tokens"] for x in made["results"])


def test_an_answer_ends_where_the_conversation_is_full(results, chat_dir):
    first = results(chat_dir, TURNS[:1])[0]
    longest = first["num_prompt_tokens"] + 3
    cut = results(chat_dir, TURNS[:1], "--max-len", str(longest))[0]
    assert cut["tokens"] == first["tokens"][:3] and cut["finish_reason"] == "length"


@pytest.mark.parametrize("left", (8, 7, 1))
def test_a_conversation_may_fill_all_that_the_model_reads(
    results, chat_dir, answer_from_scratch, left
):
    num_words = MAX_LEN - left - len(("<bos>", "<user>", "<end>", "<model>"))
    turn = " ".join(WORDS[i % len(WORDS)] for i in range(num_words))
    (made,) = results(chat_dir, (turn,), "--max-new-tokens", "12")
    assert made["num_prompt_tokens"] == MAX_LEN - left
    assert made["tokens"] == answer_from_scratch(rendered([made], 0), left)
    assert made["finish_reason"] == "length"


def test_a_chats_rows_are_no_longer_than_it_may_become():
    """Phi-3's positions are others where rows may be longer than 4096."""
    import models
    from scripts._chat import turn_of, whole_chat
    from scripts._engine import Job

    config = models.DecoderConfig(64, 32, 64, 1, 2, 1, 16)
    job = Job(prompts=((),), max_new_tokens=512, max_len=4096)
    assert whole_chat(job).cache_shape(config)["max_len"] == 4096
    for length in (3500, 3584, 3585, 4095):
        turn = turn_of(job, (1,) * length, number=0)
        assert turn.room(turn.prompts[0]) == min(512, 4096 - length)


def test_a_turn_for_which_there_is_no_room_is_refused(capsys, chat, chat_dir):
    said = refusal(capsys, chat, chat_dir, (" ".join(WORDS),), "--max-len", "64")
    assert "64 tokens; with --max-len 64 it may have at most 63" in said


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ raise_exception('no users') }}", "the chat template fails: no users"),
        ("{% if %}", "chat_template.jinja: not a chat template"),
        ("{{ '\\ud800' }}", "the chat template fails: 'utf-8' codec"),
        ("", "the chat template and the tokenizer leave nothing of this turn"),
    ],
)
def test_a_template_that_fails_is_refused(capsys, chat, changed, template, says):
    assert says in refusal(capsys, chat, changed(chat_template=template), TURNS)


def test_a_model_without_a_template_is_refused(capsys, chat, changed):
    directory = changed()
    (directory / "chat_template.jinja").unlink()
    assert "argument --chat" in refusal(capsys, chat, directory, TURNS)


def test_an_empty_stdin_is_refused(capsys, chat, chat_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "stdin has no turn" in refusal(capsys, chat, chat_dir, ())


def test_bytes_that_are_no_text_are_refused(capsys, chat, chat_dir, monkeypatch):
    broken = io.TextIOWrapper(io.BytesIO(b"w1 \xff\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", broken)
    assert "stdin is not UTF-8" in refusal(capsys, chat, chat_dir, ())
