"""What options mean: the comments beside and above the fields of the schemas, which are the one place that says it."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import fields, is_dataclass


def meanings(schema: type) -> dict[str, str]:
    """The meaning of each option of a schema, in the order of its fields; empty for one without a comment.

    A field's comment is the one on its own line, after what the comment lines directly above it say.
    """
    assert is_dataclass(schema)
    found: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        if is_dataclass(kind):
            found |= _comments(kind)
    return {field.name: found.get(field.name, "") for field in fields(schema)}


def summary(schema: type) -> str:
    """The first paragraph of a schema's docstring, on one line."""
    return " ".join((inspect.getdoc(schema) or "").partition("\n\n")[0].split())


def _comments(schema: type) -> dict[str, str]:
    """Of the fields that stand in the class itself."""
    try:
        source = textwrap.dedent(inspect.getsource(schema))
    except OSError:  # made where there is no file, such as at a prompt
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    by_line = {line: (column, text) for (line, column), text in comments.items()}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            parts = [by_line[statement.end_lineno][1]] if statement.end_lineno in by_line else []
            line = statement.lineno - 1
            while by_line.get(line, (None,))[0] == statement.col_offset:  # a comment line of its own
                parts.insert(0, by_line[line][1])
                line -= 1
            found[statement.target.id] = " ".join(parts)
    return found
