"""The fixtures made anew, and other checkpoints than those, by the transformers that is
installed.
"""

import itertools
import json

import eqx_paged
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from scripts import generate
from scripts._fixture_cases import Case, CASES, ROPE_CASES
from scripts.make_fixtures import EXPECTED, in_steps, load, make, make_rope, ROOT, save

from ..helpers import quick_jit


pytestmark = [
    pytest.mark.peers,
    # What other programs warn of is theirs.
    pytest.mark.filterwarnings("default"),
]
# Logits of size 10 in float32, summed in another order by another release.
TOLERANCE = 1e-4


def assert_same_files(made, kept):
    made, kept = (safetensors.numpy.load_file(path) for path in (made, kept))
    assert made.keys() == kept.keys()
    for name, x in kept.items():
        if x.dtype == np.float32:
            np.testing.assert_allclose(made[name], x, rtol=0, atol=TOLERANCE)
        else:
            np.testing.assert_array_equal(made[name], x)


@pytest.mark.parametrize("name", CASES)
def test_a_fixture_made_anew_is_the_same(name, tmp_path):
    make(name, tmp_path)
    for file in ("model.safetensors", EXPECTED):
        assert_same_files(tmp_path / name / file, ROOT / name / file)


def test_the_rotary_positions_made_anew_are_the_same(tmp_path):
    for name in {name for name, _ in ROPE_CASES.values()}:
        (tmp_path / name).symlink_to(ROOT / name)
    make_rope(tmp_path)
    assert_same_files(tmp_path / "rope.safetensors", ROOT / "rope.safetensors")


# Variants that no fixture has.
VARIANTS = {
    "gemma2 without caps": Case(
        "Gemma2Config",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3 with caps": Case("Gemma3TextConfig", {"attn_logit_softcapping": None}),
    "mistral without a window": Case("MistralConfig", {"sliding_window": None}),
    "qwen3 with biases": Case("Qwen3Config", {"attention_bias": True, "head_dim": 16}),
    "olmo2 with few heads": Case("Olmo2Config", {"num_key_value_heads": 1}),
}


def test_what_transformers_ignores_of_making_texts_is_read_past():
    """Also where it is not off, which alone would make any key harmless."""
    said = json.loads((ROOT / "llama" / "config.json").read_text())
    names = transformers.GenerationConfig._get_default_generation_params()
    config = models.DecoderConfig.from_dict({**said, **dict.fromkeys(names, 3)})
    assert config == models.DecoderConfig.from_dict(said)


@quick_jit
def dense_logits(decoder, tokens):
    return decoder.unembed(decoder.dense(tokens)[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_gives_the_logits_of_transformers(name, tmp_path):
    rng = np.random.default_rng(1)
    save(VARIANTS[name], rng, tmp_path / "saved")
    tokens = rng.integers(3, 97, 40)
    wanted = in_steps(load(tmp_path / "saved"), tokens, len(tokens))
    decoder = models.load_checkpoint(tmp_path / "saved", jnp.float32)
    found = dense_logits(decoder, jnp.asarray(tokens[None], jnp.int32))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_what_is_saved_is_loaded_by_transformers(tmp_path):
    decoder = models.load_checkpoint(ROOT / "phi3")
    models.save_checkpoint(decoder, tmp_path)
    tokens = np.arange(3, 43)
    wanted = in_steps(load(ROOT / "phi3"), tokens, len(tokens))
    np.testing.assert_array_equal(in_steps(load(tmp_path), tokens, len(tokens)), wanted)
    assert jax.tree.structure(models.load_checkpoint(tmp_path)) == jax.tree.structure(
        decoder
    )


# --- The command line


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>"
    "{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = ("one two", "three", "four five six")


@pytest.fixture
def chat_model(tmp_path):
    """A model with its tokenizer and its template, all as transformers saves them."""
    specials = ["<bos>", "<end>", "<user>", "<assistant>"]
    names = [*specials, *" ".join(TURNS).split(), *(f"w{i}" for i in range(87))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<end>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>"
    )
    wrapped.chat_template = TEMPLATE
    save(CASES["qwen3"], np.random.default_rng(2), tmp_path)
    # It says words only: a special token is not in the text that is read again.
    path = tmp_path / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    weights["lm_head.weight"][: len(specials)] = 0
    safetensors.numpy.save_file(weights, path, {"format": "pt"})
    wrapped.save_pretrained(tmp_path)
    return tmp_path


def test_special_tokens_are_left_out_as_by_transformers(chat_model):
    """Those that `tokenizer.json` knows, and one that `tokenizer_config.json` names."""
    path = chat_model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": "w3"}))
    wrapped = transformers.AutoTokenizer.from_pretrained(chat_model)
    tokenizer = models.load_tokenizer(chat_model)
    tokens = np.random.default_rng(5).integers(0, 97, 400).tolist()
    assert {0, 1, 2, 3, wrapped.mask_token_id} <= set(tokens)
    assert tokenizer.decode(tokens) == wrapped.decode(tokens, skip_special_tokens=True)
    text = wrapped.decode(tokens)
    spelt = wrapped(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text, add_special_tokens=False).ids == spelt


@torch.no_grad()
def answers(directory, num_new):
    """What transformers answers to the turns, each with the whole conversation anew."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model, messages, found = load(directory), [], []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(
            **prompt, max_new_tokens=num_new, do_sample=False, pad_token_id=0
        )[0, prompt["input_ids"].shape[1] :].tolist()
        found.append((prompt["input_ids"][0].tolist(), made))
        text = tokenizer.decode(made, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
    return found


def test_a_chat_is_answered_as_by_transformers(chat_model, capsys):
    turns = [part for turn in TURNS for part in ("--prompt", turn)]
    options = ("--max-new-tokens", "9", "--dtype", "float32", "--json")
    generate.main(["--model", str(chat_model), "--chat", *turns, *options])
    results = json.loads(capsys.readouterr().out)["results"]
    for result, (prompt, made) in zip(results, answers(chat_model, 9)):
        assert result["num_prompt_tokens"] == len(prompt)
        assert result["tokens"] == made
    assert results[2]["num_cached_tokens"] > results[1]["num_prompt_tokens"]


@pytest.mark.parametrize("adds", (True, False))
def test_a_prompt_is_continued_as_by_transformers(chat_model, capsys, adds):
    """Also where the configuration names a first token that the tokenizer does not add."""
    tokenizer = json.loads((chat_model / "tokenizer.json").read_text())
    if adds:
        first = {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}
        single = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}]
        single.append({"Sequence": {"id": "A", "type_id": 0}})
        tokenizer["post_processor"] = {
            **{"type": "TemplateProcessing", "single": single, "pair": single},
            "special_tokens": {"<bos>": first},
        }
        (chat_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert json.loads((chat_model / "config.json").read_text())["bos_token_id"] == 1
    options = ("--max-new-tokens", "9", "--dtype", "float32", "--json")
    generate.main(["--model", str(chat_model), "--prompt", TURNS[2], *options])
    (result,) = json.loads(capsys.readouterr().out)["results"]
    wrapped = transformers.AutoTokenizer.from_pretrained(chat_model)
    prompt = wrapped(TURNS[2], return_tensors="pt")
    assert prompt["input_ids"].shape[1] == result["num_prompt_tokens"] == 3 + adds
    made = load(chat_model).generate(
        **prompt, max_new_tokens=9, do_sample=False, pad_token_id=0
    )
    assert result["tokens"] == made[0, prompt["input_ids"].shape[1] :].tolist()


# --- Beam search


@torch.no_grad()
@pytest.mark.parametrize("num_beams, stops", ((1, ()), (3, ()), (3, (21, 60)), (5, (4,))))
def test_a_beam_search_finds_what_that_of_transformers_finds(num_beams, stops):
    theirs, decoder = load(ROOT / "llama"), models.load_checkpoint(ROOT / "llama")
    config, num_new = decoder.config, 9
    cache = eqx_paged.PagedKVCache.empty(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_pages=40,
        page_size=8,
        num_seqs=num_beams,
        max_len=64,
    )
    lengths = set()
    for seed, early in itertools.product(range(2), (False, True, "never")):
        prompt = np.random.default_rng(seed).integers(3, 97, 6 + seed)
        for penalty in (1.0, 0.0, 2.5):
            options = dict(length_penalty=penalty, early_stopping=early)
            wanted = theirs.generate(
                torch.as_tensor(prompt[None]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                num_beams=num_beams,
                num_return_sequences=num_beams,
                max_new_tokens=num_new,
                do_sample=False,
                eos_token_id=list(stops) or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
            found, _ = eqx_paged.beam_search(
                decoder,
                cache,
                np.pad(prompt, (0, 10 - len(prompt)))[None],
                np.array([len(prompt)]),
                num_beams=num_beams,
                max_new_tokens=num_new,
                stop_tokens=np.array(stops, np.int32),
                **options,
            )
            lengths |= set(found.lengths[0].tolist())
            sequences = wanted.sequences[:, len(prompt) :].numpy()
            padding = ((0, 0), (0, num_new - sequences.shape[1]))
            np.testing.assert_array_equal(found.tokens[0], np.pad(sequences, padding))
            if num_beams > 1:  # transformers' greedy search has no scores
                scores = wanted.sequences_scores.numpy()
                np.testing.assert_allclose(found.scores[0], scores, atol=TOLERANCE)
    assert len(lengths) > 3 or not stops
