"""Rewards that rules give: text in, a number out. Nothing that a model wrote is ever run; ``ast`` only reads it.

The rules judge a line of Python: the prompt is the beginning of a function up to ``return``, and the answer's first
line completes it. A line that does not end gets 0, like one that is no Python or returns nothing.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable

Rule = Callable[[str, str], float]
"""Takes the texts of prompt and answer."""


def parses(prompt: str, answer: str) -> float:
    """Return 1 where prompt and line are a function of Python that returns something, else 0."""
    return float(_returned(prompt, answer) is not None)


def uses_argument(prompt: str, answer: str) -> float:
    """Return 1 where the line parses and reads an argument of the function, else 0."""
    found = _returned(prompt, answer)
    if found is None:
        return 0.0
    arguments = {argument.arg for argument in ast.walk(found[0].args) if isinstance(argument, ast.arg)}
    return float(any(isinstance(node, ast.Name) and node.id in arguments for node in ast.walk(found[1])))


def several_names(prompt: str, answer: str) -> float:
    """Return 1 where the line parses and has more than one name of a variable, function or attribute, else 0."""
    found = _returned(prompt, answer)
    if found is None:
        return 0.0
    nodes = list(ast.walk(found[1]))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return float(len(names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}) > 1)


RULES: dict[str, Rule] = {"parses": parses, "uses_argument": uses_argument, "several_names": several_names}


def _returned(prompt: str, answer: str) -> tuple[ast.FunctionDef, ast.expr] | None:
    """Return the function and what it returns at its end; None where the line is not whole, or no Python."""
    line, newline, _ = answer.partition("\n")
    if not newline:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in strings
            last = ast.parse(prompt + line).body[-1]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a null byte; brackets in brackets
        return None
    if not isinstance(last, ast.FunctionDef):
        return None
    statement = last.body[-1]
    if not isinstance(statement, ast.Return) or statement.value is None:
        return None
    return last, statement.value
