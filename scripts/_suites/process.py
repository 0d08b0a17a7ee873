"""A side of a benchmark in a process of its own, seen from outside."""

import json
import os
import pathlib
import select
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from .measure import Lost
from .record import ROOT


# Seconds for one request. The longest is a first call, which compiles.
PATIENCE = 600.0


class Broken(Lost):
    """A side that ended, or did not answer; says why."""


class Process:
    """Asks what `protocol.serve` answers. Its stderr goes to a file."""

    def __init__(
        self,
        name: str,
        command: list[str],
        log: pathlib.Path,
        environment: Mapping[str, str] | None = None,
    ):
        self.name = name
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )

    def ready(self) -> None:
        """Waits until it has imported what it needs."""
        self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        line = json.dumps({"do": do, **arguments}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # the latter once it was closed
            raise Broken(self._last_words()) from None
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self.close()  # or a late answer would be taken for that to the next request
            raise Broken(f"it did not answer in {PATIENCE:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Broken(self._last_words())
        try:
            return json.loads(line)
        except ValueError:
            self.close()  # its next answers would be taken for others
            raise Broken(f"it answered what is not JSON: {line[:100]!r}") from None

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"it ended with {code}: {last[:300]}"


def keeping(jax_cache: pathlib.Path) -> dict[str, str]:
    """The environment of a side in JAX whose compiled programs are kept for later ones."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def ours(name: str, log: pathlib.Path, jax_cache: pathlib.Path) -> Process:
    """A process of `scripts._suites.ours`.

    **Arguments:**

    - `name`: "paged" or "contiguous".
    - `log`: for its stderr.
    - `jax_cache`: where compiled programs are kept for later processes.
    """
    command = [sys.executable, "-m", "scripts._suites.ours", name]
    return Process(name, command, log, keeping(jax_cache))
