"""What the README and the documentation show is run, and what they promise is checked."""

import contextlib
import inspect
import io
import pathlib
import re
import tomllib

import pytest


ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(
    r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)")


def is_runnable(page):
    return CODE.search(page.read_text(encoding="utf-8")) is not None


def name_of(page):
    return str(page.relative_to(ROOT))


def takes_long(page):
    """Whether it compiles generation several times."""
    return name_of(page).startswith(("docs/examples/", "docs/sampling.md"))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if takes_long(page) else page
        for page in filter(is_runnable, PAGES)
    ],
    ids=name_of,
)
def test_the_code_of_a_page_prints_what_the_page_says(page):
    """The python blocks of a page are one program; a text block right after one of them
    is what it prints."""
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "page"}
    for found in CODE.finditer(text):
        blank_lines = "\n" * text.count("\n", 0, found.start(1))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(blank_lines + found[1], str(page), "exec"), namespace)
        assert printed.getvalue() == (found[2] or "")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith("eqx_paged."):
            assert (page.parent / target).exists(), target


def test_the_api_pages_show_every_public_name():
    import eqx_paged

    pages = (ROOT / "docs" / "api").glob("*.md")
    shown = re.findall(
        r"^::: eqx_paged\.([\w.]+)$", "".join(p.read_text() for p in pages), re.MULTILINE
    )
    public = {
        prefix + name
        for prefix, module in (("", eqx_paged), ("samplers.", eqx_paged.samplers))
        for name, value in vars(module).items()
        if not (name.startswith("_") or inspect.ismodule(value))
    }
    # The same as `eqx_paged.greedy`.
    assert sorted(shown) == sorted(public - {"samplers.greedy"})


def test_the_wheel_holds_the_library_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["eqx_paged"]}
    assert (ROOT / "eqx_paged" / "py.typed").is_file()
