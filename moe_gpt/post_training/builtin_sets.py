"""Conversations that are made offline: questions on Python's own functions, and sums that a calculator answers.

Functions are split by module as the pre-training text is, so a held-out question is on code that no stage has read.
A sum is held out by a hash of its expression.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import random
import textwrap
from collections.abc import Iterator, Sequence

from moe_gpt.data.builtin_corpus import parsed_modules
from moe_gpt.data.document import Document, is_held_out
from moe_gpt.post_training.chat import Message
from moe_gpt.post_training.tools import calculate

_LONGEST_FUNCTION = 160
"""Characters of a function's source."""
_SUMS_HELD_OUT = 0.125
_ASK_SUM = ("What is {}?", "Calculate {}.", "How much is {}?")
_ASK_PARAMETERS = ("Which parameters?", "Name the parameters.")
_ASK_NAME = ("Which name?", "Name the function.")


def builtin_conversations(kind: str, held_out: bool, validation_fraction: float) -> list[list[Message]]:
    """Return the conversations of a built-in set, ``calculator`` or ``functions``, in a fixed random order.

    Args:
        held_out: those for scores instead of those for training.
        validation_fraction: share of the modules that is held out, as ``data.validation_fraction`` has it.
    """
    found = _sums(held_out) if kind == "calculator" else _on_functions(held_out, validation_fraction)
    order = random.Random(kind)
    conversations = [make(order) for make in found]
    order.shuffle(conversations)
    return conversations


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


class _Sum:
    """A sum, which the assistant leaves to the calculator."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __call__(self, order: random.Random) -> list[Message]:
        """Return a conversation on it."""
        result = calculate(self.expression)
        call = {"function": {"name": "calculator", "arguments": {"expression": self.expression}}}
        return [
            _user(order.choice(_ASK_SUM).format(self.expression)),
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": result},
            _assistant(f"It is {result}."),
        ]


class _Function:
    """A function, of which the assistant says the parameters and then the name."""

    def __init__(self, source: str, node: ast.FunctionDef) -> None:
        self.source, self.node = source, node

    def __call__(self, order: random.Random) -> list[Message]:
        """Return a conversation on it."""
        return [
            _user(f"{order.choice(_ASK_PARAMETERS)}\n{self.source}"),
            _assistant(_parameters(self.node.args)),
            _user(order.choice(_ASK_NAME)),
            _assistant(self.node.name),
        ]


def _sums(held_out: bool) -> Iterator[_Sum]:
    numbers = range(2, 100)
    for expression in (f"{a}{sign}{b}" for a in numbers for b in numbers for sign in "+-*"):
        if _is_held_out_sum(expression) == held_out:
            yield _Sum(expression)


def _is_held_out_sum(expression: str) -> bool:
    digest = hashlib.sha256(expression.encode()).digest()
    return int.from_bytes(digest[:8], "big") < _SUMS_HELD_OUT * 2**64


def _on_functions(held_out: bool, validation_fraction: float) -> list[_Function]:
    """Return the short functions of one side of the split; a held-out one has no double in the other side."""
    training, kept = _short_functions(validation_fraction)
    if not held_out:
        return list(training.values())
    return [function for source, function in kept.items() if source not in training]


@functools.cache
def _short_functions(validation_fraction: float) -> tuple[dict[str, _Function], dict[str, _Function]]:
    """Return the functions by their source, each once: those for training, and those that are held out."""
    sides: tuple[dict[str, _Function], dict[str, _Function]] = ({}, {})
    for module, text, tree in parsed_modules():
        lines, side = text.splitlines(), sides[is_held_out(Document("", module), validation_fraction)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (source := _without_docstring(node, lines)):
                side[source] = _Function(source, node)
    return sides


def _without_docstring(node: ast.FunctionDef, lines: Sequence[bytes]) -> str:
    """Return a function's source without its docstring; empty if nothing else is in it, or if it is long."""
    is_documented = ast.get_docstring(node, clean=False) is not None
    body = node.body[is_documented:]
    if not body or (node.end_lineno or 0) - node.lineno > _LONGEST_FUNCTION:
        return ""
    kept = [*lines[node.lineno - 1 : node.body[0].lineno - 1], *lines[body[0].lineno - 1 : node.end_lineno]]
    source = textwrap.dedent(b"\n".join(kept).decode("utf-8-sig")).strip()
    return source if len(source) <= _LONGEST_FUNCTION else ""


def _parameters(arguments: ast.arguments) -> str:
    """Return the names of a function's parameters as its head has them; "none" if it has no parameter."""
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return ", ".join(names) or "none"
