"""Names of the hub, of which the cache alone is asked: the tests use no network."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from models import find_checkpoint


LLAMA = pathlib.Path(__file__).parents[1] / "fixtures" / "llama"
FIND = """
import sys, models

for name in sys.argv[1:]:
    try:
        directory = models.find_checkpoint(name)
        print(models.load_checkpoint(directory).config.hidden_size)
    except FileNotFoundError as error:
        print(error)
"""


@pytest.mark.parametrize("variable", ("HF_HUB_CACHE", "HF_HOME"))
def test_a_name_is_looked_up_in_the_cache_that_the_environment_names(tmp_path, variable):
    hub = tmp_path / "hub" if variable == "HF_HOME" else tmp_path
    snapshot = hub / "models--some-org--a.model" / "snapshots" / ("0" * 40)
    shutil.copytree(LLAMA, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    environment = {k: x for k, x in os.environ.items() if not k.startswith("HF_")}
    environment |= {variable: str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FIND, "some-org/a.model", "some-org/absent"]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    )
    found, absent = ended.stdout.splitlines()
    assert found == "32"
    assert absent.startswith("some-org/absent: no such directory, and the hub's could not")


@pytest.mark.parametrize("name", ("nowhere", "/no/such", "a/b/c", "../a", "a/", "-a/b"))
def test_what_is_no_name_of_the_hub_is_only_a_directory(name):
    with pytest.raises(FileNotFoundError) as caught:
        find_checkpoint(name)
    assert str(caught.value) == f"{name}: no such directory"


def test_a_directory_comes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "some-org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("some-org/model").samefile(tmp_path / "some-org" / "model")


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="install huggingface_hub"):
        find_checkpoint("some-org/model")
