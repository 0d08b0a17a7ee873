"""The peers, and the virtual environments that they run in."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys


_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"


@dataclasses.dataclass(frozen=True)
class Environment:
    """What is installed together.

    - `steps`: what each call of pip installs, one after the other.
    - `python`: the minor versions of the oldest and the newest Python 3 that will do.
    """

    steps: tuple[tuple[str, ...], ...]
    python: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One side of `generate` and `startup`: a module of `peers` and its arguments."""

    environment: str
    module: str
    arguments: tuple[str, ...] = ()


# The peers' own versions are exact: others are other peers, and these are known to run.
# What they stand on is the newest that they can do with; reports say which that was.
ENVIRONMENTS = {
    "transformers": Environment(
        (("torch", "transformers==5.23.0", "accelerate"),), (10, 13)
    ),
    "eqx-zoo": Environment((("eqx-zoo==0.3.5", "jax<0.11"),), (12, 13)),
    "levanter": Environment(
        (
            # The last two are not declared.
            ("levanter==1.2.dev1644", "gitpython", "chex"),
            # Newer ones lack a name that it needs, which is not declared either.
            ("--no-deps", "jax==0.9.2", "jaxlib==0.9.2"),
        ),
        (12, 12),
    ),
}
PEERS = {
    "transformers dynamic": Peer("transformers", "hugging_face", ("dynamic",)),
    "transformers static": Peer("transformers", "hugging_face", ("static",)),
    "transformers continuous": Peer("transformers", "hugging_face", ("continuous",)),
    "eqx-zoo": Peer("eqx-zoo", "eqx_zoo_side"),
    "levanter": Peer("levanter", "levanter_side"),
}
TORCH = Peer("transformers", "torch_attention")
_SEARCHED = "~/.pyenv/versions/3.{}*/bin/python3.{}"


def command_of(peer: Peer, cache: pathlib.Path) -> list[str] | str:
    """What serves the peer; or, as text, why there is none."""
    stamp = _stamp(peer.environment, cache)
    if not stamp.exists():
        return "it is not installed; --install-peers does that"
    recorded = json.loads(stamp.read_text())
    if recorded["reason"]:
        return recorded["reason"]
    if recorded["requirements"] != _requirements(peer.environment):
        return "it is installed in another version; --install-peers renews it"
    module = f"scripts._suites.peers.{peer.module}"
    return [str(_interpreter(peer.environment, cache)), "-m", module, *peer.arguments]


def install(name: str, cache: pathlib.Path) -> str:
    """Installs an environment, unless the same requirements are installed there.

    **Returns:**

    Why it could not be, or "".
    """
    environment = ENVIRONMENTS[name]
    stamp = _stamp(name, cache)
    wanted = _requirements(name)
    if stamp.exists():
        recorded = json.loads(stamp.read_text())
        if recorded["requirements"] == wanted and not recorded["reason"]:
            return ""
    reason = _install(name, environment, cache)
    stamp.write_text(json.dumps({"requirements": wanted, "reason": reason}) + "\n")
    return reason


def _install(name: str, environment: Environment, cache: pathlib.Path) -> str:
    folder = _stamp(name, cache).parent
    folder.mkdir(parents=True, exist_ok=True)
    python = _python(environment)
    if python is None:
        low, high = environment.python
        return f"it needs a Python from 3.{low} to 3.{high}, and there is none here"
    log = folder / "pip.log"
    pip = [str(_interpreter(name, cache)), "-m", "pip", "install"]
    with log.open("w") as output:
        for command in (
            [python, "-m", "venv", "--clear", str(folder / "venv")],
            *([*pip, *step] for step in environment.steps),
        ):
            if subprocess.run(command, stdout=output, stderr=output).returncode:
                return f"it cannot be installed; peers/{name}/pip.log says why"
    return ""


def _requirements(name: str) -> list[list[str]]:
    return [list(step) for step in ENVIRONMENTS[name].steps]


def _python(environment: Environment) -> str | None:
    """An interpreter of a version that will do: this one if it can be."""
    low, high = environment.python
    if low <= sys.version_info.minor <= high:
        return sys.executable
    for minor in range(high, low - 1, -1):
        pattern = os.path.expanduser(_SEARCHED.format(minor, minor))
        found = sorted(pathlib.Path("/").glob(pattern.lstrip("/")))
        candidates = [shutil.which(f"python3.{minor}"), *map(str, found)]
        for candidate in filter(None, candidates):
            command = [candidate, "-c", _VERSION]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.stdout.strip() == f"3.{minor}":
                return candidate
    return None


def _stamp(name: str, cache: pathlib.Path) -> pathlib.Path:
    return cache / "peers" / name / "installed.json"


def _interpreter(name: str, cache: pathlib.Path) -> pathlib.Path:
    return cache / "peers" / name / "venv" / "bin" / "python"
