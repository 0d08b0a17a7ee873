"""Makes or updates the virtual environment that the Makefile's targets run in.

`python scripts/_venv.py DIR GROUP` installs the checkout, editable, with the extra
GROUP into DIR. What was installed is written to a stamp in DIR, so a second run only
reads that. A change of `pyproject.toml` installs again; another Python version makes
the environment anew.
"""

import hashlib
import json
import pathlib
import subprocess
import sys
import tomllib


ROOT = pathlib.Path(__file__).resolve().parent.parent
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def say(line: str) -> None:
    print(f"[setup] {line}", flush=True)


def fail(line: str) -> None:
    print(f"[setup] {line}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def interpreter(venv: pathlib.Path) -> pathlib.Path:
    folder = "Scripts" if sys.platform == "win32" else "bin"
    return venv / folder / "python"


def sound(venv: pathlib.Path) -> bool:
    """Whether `venv` is whole and of the Python version that runs this script."""
    if not interpreter(venv).exists():
        return False
    code = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
    found = subprocess.run([interpreter(venv), "-c", code], capture_output=True, text=True)
    return found.returncode == 0 and found.stdout.strip() == VERSION


def create(venv: pathlib.Path) -> None:
    try:
        import ensurepip  # noqa: F401  # some systems ship it as a package of its own
        import venv as builder
    except ImportError as error:
        fail(
            f"{sys.executable} lacks the standard module '{error.name}'. On Debian and"
            f" Ubuntu it is in the package python{VERSION}-venv."
        )
    say(f"making {venv.name} with Python {sys.version.split()[0]}")
    builder.create(venv, clear=True, with_pip=True)


def install(venv: pathlib.Path, group: str) -> None:
    say(f"installing what '{group}' needs (a few minutes the first time)")
    pip = [interpreter(venv), "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "install", "--editable", f".[{group}]"], cwd=ROOT)
    if done.returncode:
        fail("pip could not install; its own report is above")


def included(group: str, extras: dict[str, list[str]]) -> set[str]:
    """`group` and the other extras that it asks for."""
    found = {group}
    for requirement in extras[group]:
        if requirement.startswith("eqx_paged["):
            for other in requirement.removeprefix("eqx_paged[").rstrip("]").split(","):
                found |= included(other, extras)
    return found


def read_stamp(stamp: pathlib.Path, digest: str) -> list[str]:
    """The groups that `stamp` records for the present `pyproject.toml`."""
    if not stamp.exists():
        return []
    recorded = json.loads(stamp.read_text())
    groups = recorded.pop("groups")
    return groups if recorded == state(digest) else []


def state(digest: str) -> dict[str, str]:
    """What must be the same for an environment to be still up to date."""
    return {"python": VERSION, "checkout": str(ROOT), "project": digest}


def main(venv: pathlib.Path, group: str) -> None:
    stamp = venv / "eqx_paged_setup.json"
    project = (ROOT / "pyproject.toml").read_bytes()
    digest = hashlib.sha256(project).hexdigest()
    groups = read_stamp(stamp, digest) if interpreter(venv).exists() else []
    if group in groups:
        return
    if not sound(venv):
        create(venv)
        groups = []
    install(venv, group)
    extras = tomllib.loads(project.decode())["project"]["optional-dependencies"]
    groups = sorted({*groups, *included(group, extras)})
    stamp.write_text(json.dumps({**state(digest), "groups": groups}))


if __name__ == "__main__":
    main(ROOT / sys.argv[1], sys.argv[2])
