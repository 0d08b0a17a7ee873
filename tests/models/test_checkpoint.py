import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from models import (
    Checkpoint,
    Decoder,
    DecoderConfig,
    load_checkpoint,
    load_tokenizer,
    save_checkpoint,
)
from models._weight_files import StoredTensor

from ..helpers import assert_trees_identical
from .cases import published, random_decoder


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


def test_a_tied_matrix_that_is_another_is_refused(getkey, tmp_path):
    decoder = random_decoder(getkey, tie_word_embeddings=True)
    save_checkpoint(decoder, tmp_path)
    matrix = np.asarray(decoder.embed_tokens.weight).copy()
    matrix[-1, -1] += 1
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": matrix}))
    assert "lm_head.weight is not model.embed_tokens.weight" in refusal(tmp_path)


def test_an_untied_decoder_needs_its_matrix(saved):
    rewrite(saved, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing lm_head.weight" in refusal(saved)


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
    for shard in shards:
        (saved / shard).unlink()
    missing = "no such weight file: a.safetensors, b.safetensors"
    assert missing in refusal(saved, FileNotFoundError)


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"weight_map": 3}', "not an index of weight files"),
        ("{}", "not an index of weight files"),
    ],
)
def test_a_broken_index_is_named(saved, content, says):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(content)
    assert f"model.safetensors.index.json: {says}" in refusal(saved)


def test_a_tensor_in_two_shards_is_named(saved):
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    (saved / "model.safetensors").rename(saved / "a.safetensors")
    once = {"lm_head.weight": tensors["lm_head.weight"]}
    safetensors.numpy.save_file(once, saved / "b.safetensors")
    weight_map = {
        "model.norm.weight": "a.safetensors",
        **dict.fromkeys(once, "b.safetensors"),
    }
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "b.safetensors: lm_head.weight is in a.safetensors too" in refusal(saved)


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
    assert "model.layers.1.input_layernorm.weight is I32" in message


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


def test_the_bytes_are_told_before_loading(saved, getkey):
    checkpoint = Checkpoint.open(saved)
    for dtype in (None, "bfloat16"):
        leaves = jax.tree.leaves(checkpoint.load(dtype))
        assert checkpoint.num_bytes(dtype) == sum(leaf.nbytes for leaf in leaves)


# --- Shardings


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 2), ("x", "y"))


def by_rows(mesh):
    """Matrices by rows over one axis of the mesh, vectors on all devices."""

    def sharding(path):
        layout = PartitionSpec("x", None) if "proj" in path else PartitionSpec()
        return NamedSharding(mesh, layout)

    return sharding


def test_weights_lie_where_the_sharding_says(saved, mesh):
    plain, placed = load_checkpoint(saved), load_checkpoint(saved, sharding=by_rows(mesh))
    assert_trees_identical(placed, plain)
    weight = placed.layers[1].self_attn.q_proj.weight
    assert weight.sharding == NamedSharding(mesh, PartitionSpec("x", None))
    expected = np.split(np.asarray(plain.layers[1].self_attn.q_proj.weight), 2)
    assert len(weight.addressable_shards) == 4
    for shard in weight.addressable_shards:
        half = int(shard.device not in mesh.devices[0])
        np.testing.assert_array_equal(shard.data, expected[half])
    assert placed.norm.weight.sharding.is_fully_replicated


def test_one_sharding_serves_all_weights(saved):
    device = jax.devices()[3]
    placed = load_checkpoint(saved, "bfloat16", sharding=SingleDeviceSharding(device))
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(placed))
    assert_trees_identical(placed, load_checkpoint(saved, "bfloat16"))


def test_only_a_devices_part_is_read_for_it_and_once(saved, mesh, monkeypatch):
    read = []
    whole = StoredTensor.read

    def count(self, spans, dtype):
        part = whole(self, spans, dtype)
        read.append((self.name, part.size))
        return part

    monkeypatch.setattr(StoredTensor, "read", count)
    load_checkpoint(saved, sharding=by_rows(mesh))
    name = "model.layers.0.mlp.up_proj.weight"
    assert [size for found, size in read if found == name] == [40 * 48] * 2
    assert [size for found, size in read if found == "model.norm.weight"] == [48]


def test_shardings_that_do_not_fit_are_told_before_reading(saved, mesh, monkeypatch):
    monkeypatch.delattr(StoredTensor, "read")
    uneven = NamedSharding(mesh, PartitionSpec("x"))
    with pytest.raises(ValueError) as caught:
        load_checkpoint(saved, sharding=uneven)
    message = str(caught.value)
    # 97 tokens cannot be halved; all else can.
    assert "embed_tokens.weight (97, 48)" in message
    assert "lm_head.weight (97, 48)" in message and "q_proj" not in message


# --- Memory


# Prints the weights' bytes, and by how much the most memory that the process had while it
# read them is above what it had before.
MEASURE = """
import pathlib, re, sys
import jax, models

directory, dtype = sys.argv[1:]
models.load_checkpoint(directory + "/small", dtype)
checkpoint = models.Checkpoint.open(directory)

def status(name):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\\s+(\\d+) kB", text)[1]) * 1024

pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
model = checkpoint.load(dtype)
peak = status("VmHWM")
print(sum(x.nbytes for x in jax.tree.leaves(model)), peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc"
)
@pytest.mark.parametrize("stored", ("float32", "bfloat16"))
@pytest.mark.parametrize("loaded", ("float32", "bfloat16"))
def test_loading_takes_no_more_than_the_largest_weight_besides(tmp_path, stored, loaded):
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "num_hidden_layers": 4}
    config = DecoderConfig.from_dict(published(**sizes, intermediate_size=2048))
    shapes = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    save_checkpoint(jax.tree.map(lambda x: jnp.ones(x.shape, stored), shapes), tmp_path)
    small = DecoderConfig.from_dict(published(num_hidden_layers=1))
    save_checkpoint(Decoder(small, key=jax.random.key(0)), tmp_path / "small")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), loaded]
    # What is freed goes back at once, instead of being kept for what comes.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    )
    weights, raised = map(int, ended.stdout.split())
    largest = 8192 * 1024 * max(jnp.dtype(stored).itemsize, jnp.dtype(loaded).itemsize)
    # What the allocator and the interpreter take, which does not grow with the model.
    slack = 8 * 2**20
    assert weights + largest + slack < 2 * weights, "the model is too small to tell"
    assert raised <= weights + largest + slack
