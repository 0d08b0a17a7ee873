"""Saving back in the layout of the checkpoint that was loaded."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from models import Decoder, DecoderConfig, load_checkpoint, save_checkpoint

from ..helpers import assert_trees_identical
from .cases import published, random_decoder


# Tiny models as transformers saves them, one of each family.
FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
# All but one of a family that cannot be loaded.
CHECKPOINTS = sorted(
    {path.parent.name for path in FIXTURES.glob("*/config.json")} - {"gpt_oss"}
)


@pytest.fixture
def sharded(getkey, tmp_path):
    """A checkpoint as another program writes it: two shards, frequencies, a tied matrix
    stored again, keys that are not ours, and a tokenizer."""
    source = tmp_path / "source"
    save_checkpoint(random_decoder(getkey, tie_word_embeddings=True), source)
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for (shard, mine), note in zip(shards.items(), ({"format": "pt"}, None)):
        part = {name: tensors[name] for name in mine}
        safetensors.numpy.save_file(part, source / shard, note)
    weight_map = {name: shard for shard, mine in shards.items() for name in mine}
    index = {"metadata": {"total_size": 1, "parts": 2}, "weight_map": weight_map}
    config = published(tie_word_embeddings=True, transformers_version="9", dtype="float32")
    texts = {
        "model.safetensors.index.json": json.dumps(index, indent=2) + "\n",
        "config.json": json.dumps(config, indent=4, sort_keys=True),
        "generation_config.json": '{"eos_token_id": [2]}',
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"bos_token": "\u00e9"}',
        "chat_template.jinja": "{{ messages }}\r\n",
    }
    for name, text in texts.items():
        (source / name).write_bytes(text.encode())
    return source


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_was_loaded_is_saved_back_bit_for_bit(sharded, tmp_path):
    save_checkpoint(load_checkpoint(sharded), tmp_path / "copy", like=sharded)
    assert contents(tmp_path / "copy") == contents(sharded)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_transformers_saved_is_saved_back_bit_for_bit(name, tmp_path):
    save_checkpoint(load_checkpoint(FIXTURES / name), tmp_path, like=FIXTURES / name)
    source = contents(FIXTURES / name)
    source.pop("expected.safetensors", None)
    assert contents(tmp_path) == source


@pytest.mark.parametrize("name", ("llama", "phi3", "gemma2"))
def test_without_a_layout_to_keep_the_model_is_the_same(name, tmp_path):
    """Also where one tensor holds several weights."""
    decoder = load_checkpoint(FIXTURES / name)
    save_checkpoint(decoder, tmp_path)
    assert_trees_identical(load_checkpoint(tmp_path), decoder)


def test_a_converted_model_keeps_the_layout_and_says_its_dtype(sharded, tmp_path):
    copy = tmp_path / "copy"
    decoder = load_checkpoint(sharded, "bfloat16")
    save_checkpoint(decoder, copy, like=sharded)
    assert contents(copy).keys() == contents(sharded).keys()
    assert_trees_identical(load_checkpoint(copy), decoder)
    old, new = (json.loads((d / "config.json").read_text()) for d in (sharded, copy))
    assert new == {**old, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(decoder))
    assert index["metadata"] == {"total_size": num_bytes, "parts": 2}


def test_a_sharded_decoder_is_saved_whole(sharded, tmp_path):
    mesh = jax.make_mesh((4,), ("x",))
    layout = jax.sharding.PartitionSpec("x")

    def sharding(path):
        whole = jax.sharding.PartitionSpec()
        return jax.sharding.NamedSharding(mesh, layout if "proj" in path else whole)

    decoder = load_checkpoint(sharded, sharding=sharding)
    save_checkpoint(decoder, tmp_path / "copy", like=sharded)
    assert contents(tmp_path / "copy") == contents(sharded)


def test_changed_weights_are_saved_over_the_checkpoint_itself(sharded):
    decoder = jax.tree.map(lambda x: x * jnp.float32(2), load_checkpoint(sharded))
    save_checkpoint(decoder, sharded, like=sharded)
    assert_trees_identical(load_checkpoint(sharded), decoder)


def test_the_layout_of_another_model_is_refused(sharded, tmp_path):
    config = DecoderConfig.from_dict(published(num_hidden_layers=1))
    decoder = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    with pytest.raises(ValueError, match="another configuration"):
        save_checkpoint(decoder, tmp_path / "copy", like=sharded)
    assert not (tmp_path / "copy").exists()


def test_shards_are_not_saved_beside_a_file_that_hides_them(sharded, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="would be read instead"):
        save_checkpoint(load_checkpoint(sharded), copy, like=sharded)
    assert contents(copy) == {"model.safetensors": b""}
