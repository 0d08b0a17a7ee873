import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from models import load_checkpoint, load_tokenizer, save_checkpoint

from ..helpers import assert_trees_identical
from .cases import random_decoder


def as_dtype(decoder, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), decoder)


@pytest.fixture
def saved(getkey, tmp_path):
    save_checkpoint(random_decoder(getkey), tmp_path)
    return tmp_path


def rewrite(directory, change):
    """Changes a checkpoint's tensors, given by name."""
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def refusal(directory, error: type[Exception] = ValueError):
    with pytest.raises(error) as caught:
        load_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    return message


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("tied", (True, False))
def test_what_is_saved_is_loaded_bit_for_bit(getkey, tmp_path, dtype, tied):
    decoder = as_dtype(random_decoder(getkey, tie_word_embeddings=tied), dtype)
    save_checkpoint(decoder, tmp_path / "new" / "directory")
    loaded = load_checkpoint(tmp_path / "new" / "directory")
    assert_trees_identical(loaded, decoder)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_weights_are_converted_if_asked(getkey, tmp_path, dtype):
    decoder = random_decoder(getkey)
    save_checkpoint(as_dtype(decoder, jnp.bfloat16), tmp_path)
    expected = as_dtype(as_dtype(decoder, jnp.bfloat16), dtype)
    assert_trees_identical(load_checkpoint(tmp_path, dtype), expected)


def test_names_shapes_and_notes_are_the_published_ones(saved):
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    layer = {
        "input_layernorm": (48,),
        "self_attn.q_proj": (64, 48),
        "self_attn.k_proj": (32, 48),
        "self_attn.v_proj": (32, 48),
        "self_attn.o_proj": (48, 64),
        "post_attention_layernorm": (48,),
        "mlp.gate_proj": (80, 48),
        "mlp.up_proj": (80, 48),
        "mlp.down_proj": (48, 80),
    }
    expected = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(2)
        for name, shape in layer.items()
    }
    expected["model.embed_tokens.weight"] = (97, 48)
    expected["model.norm.weight"] = (48,)
    expected["lm_head.weight"] = (97, 48)
    assert {name: x.shape for name, x in tensors.items()} == expected
    with safetensors.safe_open(saved / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((saved / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_tied_decoder_has_no_second_matrix(getkey, tmp_path):
    save_checkpoint(random_decoder(getkey, tie_word_embeddings=True), tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors


def test_a_tied_decoder_may_store_its_matrix_twice(getkey, tmp_path):
    decoder = random_decoder(getkey, tie_word_embeddings=True)
    save_checkpoint(decoder, tmp_path)
    matrix = np.asarray(decoder.embed_tokens.weight)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": matrix}))
    assert_trees_identical(load_checkpoint(tmp_path), decoder)


def test_shards_are_put_together(saved):
    whole = load_checkpoint(saved)
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, mine in shards.items():
        safetensors.numpy.save_file({n: tensors[n] for n in mine}, saved / shard)
    weight_map = {name: shard for shard, mine in shards.items() for name in mine}
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_trees_identical(load_checkpoint(saved), whole)
    (saved / "b.safetensors").unlink()
    assert "b.safetensors: no such file" in refusal(saved, FileNotFoundError)
    for broken in ("{", "[]", '{"weight_map": 3}', "{}", "[" * 200_000):
        index.write_text(broken)
        assert "not an index of weight files" in refusal(saved)


@pytest.mark.parametrize("name", (3, None, "../model.safetensors", "/a", "a/b"))
def test_what_is_no_name_of_a_shard_is_not_opened(saved, name):
    (saved / "model.safetensors").unlink()
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert f"{name!r} is not the name of a weight file" in refusal(saved)


def test_stored_frequencies_are_passed_over(saved):
    whole = load_checkpoint(saved)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(saved, lambda tensors: tensors.update({name: np.ones(8, np.float32)}))
    assert_trees_identical(load_checkpoint(saved), whole)


def test_all_wrong_tensors_are_told_at_once(saved):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = np.ones(3, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
        name = "model.layers.1.input_layernorm.weight"
        tensors[name] = tensors[name].astype(np.int32)

    rewrite(saved, spoil)
    message = refusal(saved)
    assert "missing model.norm.weight" in message
    assert "unexpected model.extra.weight" in message
    assert "lm_head.weight is (48, 97), not (97, 48)" in message
    assert "model.layers.1.input_layernorm.weight is int32" in message


@pytest.mark.parametrize("name", ("config.json", "model.safetensors"))
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    assert f"{name}: no such file" in refusal(saved, FileNotFoundError)


def test_a_missing_directory_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    assert "no such directory" in refusal(missing, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        load_tokenizer(missing)


def test_a_broken_configuration_is_named(saved):
    (saved / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refusal(saved)


@pytest.mark.parametrize("keep", (0, 7, 100, -1))
def test_broken_weights_are_named(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors: not a safetensors file" in refusal(saved)


def test_a_failed_save_leaves_the_old_file(saved, getkey, monkeypatch):
    whole = load_checkpoint(saved)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(random_decoder(getkey), saved)
    monkeypatch.undo()
    assert_trees_identical(load_checkpoint(saved), whole)


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(tmp_path)
