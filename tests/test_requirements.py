"""What is imported is asked for: everything works without what nobody declared."""

import importlib.metadata
import re
import subprocess
import sys

import pytest


# A module that is None cannot be imported, as if nothing had installed it.
WITHOUT = """
import importlib, sys
missing, wanted = (names.split() for names in sys.argv[1:])
sys.modules.update(dict.fromkeys(missing))
for name in wanted:
    importlib.import_module(name)
"""


def canonical(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def requirements(distribution, extras):
    """The names, and extras, that `distribution` asks for on this machine."""
    packaging = pytest.importorskip("packaging.requirements")
    for line in importlib.metadata.requires(distribution) or ():
        found = packaging.Requirement(line)
        marker = found.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras)):
            yield canonical(found.name), frozenset(found.extras)


def installed_for(extra):
    """The distributions that `pip install eqx_paged[extra]` brings."""
    todo, seen = [("eqx-paged", frozenset({extra} - {""}))], set()
    while todo:
        asked = todo.pop()
        if asked not in seen:
            seen.add(asked)
            todo.extend(requirements(*asked))
    return {name for name, _ in seen}


@pytest.mark.parametrize(
    "extra, modules",
    [
        ("", "eqx_paged eqx_paged.reference eqx_paged.samplers"),
        ("models", "models scripts.demo scripts.generate"),
        ("train", "models scripts.train"),
        ("bench", "models scripts.bench scripts.serve_batch"),
    ],
)
def test_imports_need_only_what_is_declared(extra, modules):
    declared = installed_for(extra)
    distributions = importlib.metadata.packages_distributions()
    missing = [
        name
        for name, sources in distributions.items()
        if declared.isdisjoint(map(canonical, sources))
    ]
    command = [sys.executable, "-c", WITHOUT, " ".join(missing), modules]
    subprocess.run(command, check=True, timeout=300)
