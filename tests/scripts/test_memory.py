"""What is said of a model that does not fit, and that it is true."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import models

    folder = tmp_path_factory.mktemp("model")
    config = models.DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
    )
    shapes = jax.eval_shape(lambda key: models.Decoder(config, key=key), jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    models.save_checkpoint(zeros, folder)
    return models.Checkpoint.open(folder)


def job(**changes):
    from scripts._engine import Job

    prompts = {"prompts": ((1,) * 100,), "max_new_tokens": 4000, "max_len": 8192}
    return Job(**{**prompts, "burst": 1, **changes})


@pytest.fixture
def options():
    from scripts._options import parse_options

    return parse_options(["--prompt", "a"])


@pytest.fixture
def said(checkpoint, options, capsys, monkeypatch):
    """What is refused when so much memory is free; None if nothing is."""
    from scripts import _memory

    def _said(free, job, **changes):
        monkeypatch.setattr(_memory, "free_memory", lambda: free)
        try:
            changed = dataclasses.replace(options, **changes)
            _memory.check_memory(checkpoint, job, changed)
        except SystemExit as error:
            assert error.code == 2
            shown = capsys.readouterr().err
            assert shown.count("\n") == 1
            return shown
        return None

    return _said


def need(checkpoint, job, dtype=None):
    from scripts._memory import Need

    return Need.of(checkpoint, job.cache_shape(checkpoint.config), dtype)


def test_what_is_needed_is_what_is_made(checkpoint):
    from scripts._engine import nothing_held

    for dtype in (None, "bfloat16"):
        model = checkpoint.load(dtype)
        found = need(checkpoint, job(), dtype)
        assert found.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        assert found.cache == nothing_held(model, job()).cache.num_bytes


def test_what_fits_is_not_refused(said, checkpoint):
    assert said(need(checkpoint, job()).total, job()) is None


def test_what_is_needed_and_what_is_free_are_told(said, checkpoint):
    found = need(checkpoint, job())
    shown = said(found.total - 1, job())
    assert f"the weights would take {found.weights / 1024:,.1f} KiB" in shown
    assert f"the cache {found.cache / 2**20:,.1f} MiB" in shown
    assert f"{(found.total - 1) / 2**20:,.1f} MiB of memory are free" in shown


def test_the_length_that_is_told_is_the_greatest_that_fits(said, checkpoint):
    free = need(checkpoint, job()).total // 2
    max_len = int(re.search(r"--max-len (\d+)", said(free, job()))[1])
    assert said(free, job(max_len=max_len)) is None
    assert said(free, job(max_len=max_len + 1)) is not None


def test_half_the_bytes_are_told_to_fit_where_they_do(said, checkpoint):
    half = need(checkpoint, job(), "bfloat16").total
    assert "--dtype bfloat16" in said(half, job())
    assert said(half, job(), dtype="bfloat16") is None
    assert "--dtype" not in said(half - 1, job()).split("--max-len")[0]


def test_smaller_pages_are_told_to_fit_where_rows_are_short(said, checkpoint):
    rows = {"prompts": ((1, 2),) * 40, "max_new_tokens": 6}
    wide, narrow = (job(**rows, page_size=size) for size in (256, 64))
    free = need(checkpoint, narrow).total
    assert "--page-size 64" in said(free, wide)
    assert said(free, narrow) is None


def test_two_changes_are_told_where_one_is_not_enough(said, checkpoint):
    weights = checkpoint.num_bytes("bfloat16")
    free = weights + need(checkpoint, job(max_len=300), "bfloat16").cache
    assert free < need(checkpoint, job(max_len=101)).total
    shown = said(free, job())
    assert re.search(r"with --dtype bfloat16 --max-len \d+ it would fit", shown)


def test_it_is_told_that_nothing_helps(said):
    assert "no --max-len, --page-size or --dtype would make it fit" in said(1000, job())


def test_the_memory_that_is_free_is_found():
    from scripts._free_memory import free_memory

    assert 2**20 < free_memory() < 2**50


MEMINFO = "MemTotal:  8000 kB\nMemFree:  10 kB\nMemAvailable:  4000 kB\n"


@pytest.fixture
def host_memory(tmp_path):
    """What is free on a machine that tells as much in these files."""
    from scripts._free_memory import host_memory

    def _host_memory(files):
        for name, content in {"proc/meminfo": MEMINFO, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return host_memory(tmp_path)

    return _host_memory


def group(folder, limit, used=100, dropped=30, version=2):
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    kind = "total_inactive_file" if version == 1 else "inactive_file"
    contents = (f"{limit}\n", f"{used}\n")
    files = {f"memory.{name}": text for name, text in zip(names, contents, strict=True)}
    # The first is not what is looked for.
    files["memory.stat"] = f"slab_{kind} 7\n{kind} {dropped}\nactive_file 5\n"
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in files.items()}


V1, V2 = (
    {"proc/self/cgroup": text}
    for text in ("12:cpu,cpuacct:/box\n4:memory:/box/job\n", "0::/box/job\n")
)


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, 4000 * 1024),
        ({**V2, **group("box/job/", 1000)}, 930),
        ({**V2, **group("box/job/", 1000), **group("box/", 900)}, 830),
        ({**V2, **group("box/job/", "max"), **group("box/", 900)}, 830),
        ({**V2, **group("", 1000)}, 930),
        ({**V2, **group("box/job/", 2**40)}, 4000 * 1024),
        ({**V2, **group("box/job/", 50)}, 0),
        ({**V2, **group("other/", 1000)}, 4000 * 1024),
        ({**V1, **group("memory/box/job/", 1000, version=1)}, 930),
        ({**V1, **group("memory/", 1000, version=1)}, 930),
        ({**V1, **group("memory/box/job/", 2**63 - 4096, version=1)}, 4000 * 1024),
    ],
)
def test_a_control_group_leaves_no_more_than_its_limit(host_memory, files, free):
    assert host_memory(files) == free


def test_a_chat_is_measured_at_its_full_length(checkpoint):
    from scripts._chat import whole_chat

    turn = job(prompts=((),), max_new_tokens=6, max_len=4096)
    # Two layers of keys and values, two heads of 16 float32.
    assert need(checkpoint, whole_chat(turn)).cache >= 4096 * 2 * 2 * 2 * 16 * 4
