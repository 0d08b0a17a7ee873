import pathlib
import subprocess

import pytest
from scripts import _venv as script


ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Runs the set-up with its slow steps replaced, and tells which of them it took."""
    taken = []
    venv = tmp_path / "venv"

    def create(folder):
        taken.append("create")
        python = script.interpreter(folder)
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()

    monkeypatch.setattr(script, "create", create)
    monkeypatch.setattr(script, "install", lambda _, group: taken.append(group))
    monkeypatch.setattr(script, "sound", lambda folder: script.interpreter(folder).exists())

    def _steps(group):
        taken.clear()
        script.main(venv, group)
        return list(taken)

    return _steps


def test_a_second_set_up_does_nothing(steps):
    assert steps("models") == ["create", "models"]
    assert steps("models") == []


def test_a_group_brings_those_that_it_includes(steps):
    assert steps("dev") == ["create", "dev"]
    for group in ("test", "models", "train", "docs", "bench"):
        assert steps(group) == []


def test_another_group_is_added(steps):
    steps("models")
    assert steps("test") == ["test"]
    assert steps("models") == []


@pytest.mark.parametrize("name", ("VERSION", "ROOT"))
def test_another_python_or_checkout_installs_again(steps, monkeypatch, tmp_path, name):
    steps("models")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    monkeypatch.setattr(script, name, {"VERSION": "3.99", "ROOT": tmp_path}[name])
    assert steps("models") == ["models"]


def test_another_project_installs_again(steps, monkeypatch, tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_bytes((ROOT / "pyproject.toml").read_bytes())
    monkeypatch.setattr(script, "ROOT", tmp_path)
    steps("models")
    project.write_bytes(project.read_bytes() + b"\n# changed\n")
    assert steps("models") == ["models"]


def test_an_empty_folder_is_no_environment(tmp_path):
    assert not script.sound(tmp_path)


def test_make_says_what_a_missing_python_lacks():
    made = subprocess.run(
        ["make", "PYTHON=no-such-python", "demo"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode != 0
    assert "Python 3.11 or newer is needed, but no-such-python says:" in made.stderr


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit\nexit 1\n')
    old.chmod(0o755)
    made = subprocess.run(
        ["make", f"PYTHON={old}", "test"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode != 0
    assert f"but {old} says: Python 3.8.1" in made.stderr
