"""Shows the documentation of generated constructors; `mkdocs.yml` names this file.

A module's `__init__` is made from its fields, and documented after the class by
`Name.__init__.__doc__ = ...`, which a reader of the source alone does not connect.
"""

import ast
from typing import Any

import griffe


class InitDocs(griffe.Extension):
    """Gives such classes an `__init__` with the fields as parameters."""

    def on_module_members(
        self, *, node: ast.AST | griffe.ObjectNode, mod: griffe.Module, **_: Any
    ) -> None:
        """Looks through one module's assignments."""
        docs: dict[str, str] = {}
        for statement in getattr(node, "body", ()):
            if not isinstance(statement, ast.Assign):
                continue
            name = _owner(statement.targets[0])
            if name is not None:
                docs[name] = _text(statement.value, docs)
                mod.set_member((name, "__init__"), _init(mod[name], docs[name]))


def _owner(target: ast.expr | None) -> str | None:
    """`Name` if `target` is `Name.__init__.__doc__`."""
    found = ast.unparse(target).split(".") if target is not None else []
    return found[0] if found[1:] == ["__init__", "__doc__"] else None


def _text(value: ast.expr, docs: dict[str, str]) -> str:
    other = _owner(value)
    return docs[other] if other is not None else ast.literal_eval(value)


def _init(cls: griffe.Class, text: str) -> griffe.Function:
    fields = [
        _parameter(member)
        for member in cls.members.values()
        if isinstance(member, griffe.Attribute) and "property" not in member.labels
    ]
    init = griffe.Function("__init__", parameters=griffe.Parameters(*fields))
    init.docstring = griffe.Docstring(text, parent=init)
    init.lineno = cls.lineno
    return init


def _parameter(field: griffe.Attribute) -> griffe.Parameter:
    options, default = {}, field.value
    if isinstance(default, griffe.ExprCall):
        options = {
            argument.name: argument.value
            for argument in default.arguments
            if isinstance(argument, griffe.ExprKeyword)
        }
        default = options.get("default")
    keyword = str(options.get("kw_only")) == "True"
    kind = griffe.ParameterKind.keyword_only if keyword else None
    return griffe.Parameter(
        field.name,
        annotation=field.annotation,
        kind=kind or griffe.ParameterKind.positional_or_keyword,
        default=default,
    )
