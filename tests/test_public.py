"""The public surface, and the rules of the sources that can be checked by reading them."""

import ast
import inspect
import pathlib
import typing

import equinox as eqx
import jax
import pytest


ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "eqx_paged"

CLASSES = (
    *("PageTable", "PagedKVCache", "KVPages", "RaggedBatch", "RaggedKVCache", "RaggedKV"),
    *("PageCopies",),
    *("PagedAttention", "RaggedAttention", "PagedMultiheadAttention", "Generation"),
    *("Hypotheses", "LogProbs", "Drafted", "PromptLookup", "DraftModel"),
)
ARRAY_FUNCTIONS = (
    *("paged_attention", "ragged_paged_attention", "ragged_mqa", "ragged_mha"),
    *("ragged_gqa", "write_kv"),
)
FUNCTIONS = (
    *ARRAY_FUNCTIONS,
    *("merge_residuals", "mha_cost_estimate", "generate", "greedy", "stream"),
    "beam_search",
)


def sources(*folders):
    files = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in files]


def tree_of(path):
    return ast.parse(path.read_text())


# --- Names


def test_the_public_names_are_there():
    import eqx_paged

    for name in (*CLASSES, *FUNCTIONS, "RESULTS", "reference"):
        assert hasattr(eqx_paged, name), name
    for name in CLASSES:
        assert issubclass(getattr(eqx_paged, name), eqx.Module)
    for name in ARRAY_FUNCTIONS:
        assert callable(getattr(eqx_paged.reference, name))


def test_results_are_their_own_messages():
    import eqx_paged

    names = (
        *("invalid_argument", "too_many_tokens", "sequence_too_long"),
        *("out_of_pages", "row_in_use"),
    )
    results = eqx_paged.RESULTS
    messages = [results[getattr(results, name)] for name in names]
    assert len(set(messages)) == len(names)
    assert all(len(message) > 10 for message in messages)
    assert results[results.successful] == ""


# --- Types


def public_callables():
    """`(name, function)` of all that a user may call."""
    import eqx_paged

    for name in FUNCTIONS:
        yield name, getattr(eqx_paged, name)
    for name in ARRAY_FUNCTIONS:
        yield f"reference.{name}", getattr(eqx_paged.reference, name)
    for name, value in vars(eqx_paged.samplers).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            yield f"samplers.{name}", value
    samplers = eqx_paged.samplers
    plain = (
        eqx_paged.Stream,
        eqx_paged.PrefixIndex,
        samplers.Chain,
        samplers.History,
        samplers.Processor,
    )
    for cls in (*(getattr(eqx_paged, name) for name in CLASSES), *plain):
        class_name = cls.__name__
        for name, member in vars(cls).items():
            if name.startswith("_") and name != "__call__":
                continue
            if isinstance(member, classmethod | staticmethod):
                member = member.__func__
            if isinstance(member, property):
                member = member.fget
            if callable(member):
                yield f"{class_name}.{name}", inspect.unwrap(member)


def is_array_type(annotation):
    return "jaxtyping" in f"{type(annotation)} {annotation}" or (
        typing.get_args(annotation) and any(map(is_array_type, typing.get_args(annotation)))
    )


def test_every_public_signature_is_typed():
    untyped = []
    for name, function in public_callables():
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            if parameter.name in ("self", "cls"):
                continue
            if parameter.annotation is inspect.Parameter.empty:
                untyped.append(f"{name}({parameter.name})")
            # An array whose shape is not said.
            if parameter.annotation in (jax.Array, "Array"):
                untyped.append(f"{name}({parameter.name}: Array)")
        if signature.return_annotation is inspect.Signature.empty:
            untyped.append(f"{name} ->")
    assert untyped == []


def test_every_public_signature_has_a_docstring():
    assert [name for name, f in public_callables() if not inspect.getdoc(f)] == []


def test_the_array_functions_take_shaped_arrays():
    import eqx_paged

    for name in ARRAY_FUNCTIONS:
        parameters = inspect.signature(getattr(eqx_paged, name)).parameters.values()
        arrays = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert len(arrays) >= 5
        for parameter in arrays:
            assert is_array_type(parameter.annotation), (name, parameter)


def test_every_field_of_a_module_is_typed():
    import eqx_paged

    for name in CLASSES:
        cls = getattr(eqx_paged, name)
        for field in cls.__dataclass_fields__.values():
            assert field.type not in (None, jax.Array, typing.Any), (name, field.name)


# --- Sources


@pytest.mark.parametrize("path", sources("eqx_paged", "models", "scripts"))
def test_types_are_not_hidden_from_the_runtime_check(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "__future__", "from __future__ import"
            if node.module in ("typing", "typing_extensions"):
                assert all(alias.name != "Self" for alias in node.names), "Self"


@pytest.mark.parametrize("path", [p for p in sources("eqx_paged") if "__init__" in p.id])
def test_init_files_hold_re_exports_only(path):
    for node in tree_of(path).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant)  # the docstring
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                private = alias.asname is not None and alias.asname.startswith("_")
                assert alias.asname == alias.name or private, alias.name
        else:
            # The one assignment that a package has.
            assert isinstance(node, ast.Assign), ast.dump(node)
            assert [x.id for x in node.targets] == ["__version__"]


def imported_modules(path):
    """Absolute names of what a source of the package imports, its own modules included."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module
                continue
            base = package[: len(package) - node.level + 1]
            if node.module:
                base = (*base, *node.module.split("."))
                yield ".".join(base)
            yield from (".".join((*base, alias.name)) for alias in node.names)


@pytest.mark.parametrize("path", sources("eqx_paged"))
def test_imports_point_one_way(path):
    modules = set(imported_modules(path))
    tops = {module.split(".")[0] for module in modules}
    assert not tops & {"models", "scripts", "tests"}
    parts = path.relative_to(PACKAGE).parts
    if parts[0] == "kernels":
        # Arrays only: of the package's other modules, nothing but the shared aliases.
        own = {m for m in modules if m.startswith("eqx_paged")}
        allowed = ("eqx_paged.kernels", "eqx_paged._types")
        assert all(m.startswith(allowed) for m in own), own
        if parts[-1] in ("reference.py", "xla.py") or parts[-1].startswith("pallas"):
            assert not any(m.endswith(".api") for m in own), own
    elif parts != ("__init__.py",):
        assert "eqx_paged" not in modules


@pytest.mark.parametrize(
    "name, value", (("pages_per_compute_block", 0), ("num_queries_per_block", -16))
)
def test_what_is_no_config_is_refused(name, value):
    import eqx_paged

    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        eqx_paged.TPUConfig(**{name: value})


USERS = sources("models", "scripts")


@pytest.mark.skipif(not USERS, reason="there are no models or scripts")
@pytest.mark.parametrize("path", USERS)
def test_models_and_scripts_use_only_what_is_exported(path):
    import eqx_paged

    public = {n for n in vars(eqx_paged) if not n.startswith("_")} - {"kernels"}
    public |= {"__version__"}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "eqx_paged":
                    assert alias.name == "eqx_paged", alias.name
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == (
            "eqx_paged"
        ):
            assert node.module == "eqx_paged", node.module
            assert {alias.name for alias in node.names} <= public
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "eqx_paged":
                assert node.attr in public, node.attr
