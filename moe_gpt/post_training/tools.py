"""Tools that an assistant may call: a calculator, and a search in a folder of texts.

A model writes whatever it has learned to write, so no tool evaluates code, and no result is longer than a limit.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_gpt.errors import InputError

MOST_CHARACTERS = 800
"""Of a tool's result; what is longer is cut."""
_MOST_EXPRESSION = 64
"""Characters. Without powers, no value has more digits than that."""
_OPERATIONS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}
PASSAGE, _N_PASSAGES = 400, 3
"""Characters of a passage, and passages of a result."""
NOTHING = "nothing found"


class Call(NamedTuple):
    """What a model asks of a tool."""

    name: str
    arguments: Mapping[str, Any]


class Tool(NamedTuple):
    """Something that a model may call."""

    name: str
    argument: str
    """The name of its one argument, a text."""
    run: Callable[[str], str]


def run_tool(tools: Mapping[str, Tool], call: Call) -> str:
    """Return a tool's result, or ``error: ...`` for the model to read."""
    tool = tools.get(call.name)
    if tool is None:
        return f"error: there is no tool {call.name!r}; there are {', '.join(tools) or 'none'}"
    given = call.arguments.get(tool.argument)
    if not isinstance(given, str) or len(call.arguments) != 1:
        return f"error: {tool.name} takes one text, {tool.argument}"
    result = tool.run(given)
    return result if len(result) <= MOST_CHARACTERS else result[: MOST_CHARACTERS - 3] + "..."


def calculate(expression: str) -> str:
    """Return the value of an expression of whole numbers, + - * // % and parentheses, or ``error: ...``."""
    if len(expression) > _MOST_EXPRESSION:
        return f"error: an expression has at most {_MOST_EXPRESSION} characters"
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "error: only whole numbers, + - * // % and parentheses"


def _value(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp | ast.BinOp) and type(node.op) in _OPERATIONS:
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return _OPERATIONS[type(node.op)](*map(_value, parts))
    raise ValueError


CALCULATOR = Tool("calculator", "expression", calculate)


def make_search(folder: Path) -> Tool:
    """Return a search in the texts of a folder.

    Raises:
        InputError: where it is no folder, or has no text, or bm25s is not installed.
    """
    if not folder.is_dir():
        raise InputError(f"search={folder} must be a folder, and there is none of that name")
    passages = list(_passages(folder))
    if not passages:
        raise InputError(f"{folder} has no files of UTF-8 text (*.txt, *.md, *.rst, *.py) to search")
    find = make_index([passage for _, passage in passages])

    def search(query: str) -> str:
        found = [passages[place] for place in find(query, _N_PASSAGES)]
        return "\n".join(f"{name}: {text}" for name, text in found) or NOTHING

    return Tool("search", "query", search)


def make_index(passages: Sequence[str]) -> Callable[[str, int], list[int]]:
    """Return what finds the numbers of the best passages for a query, by BM25 (Robertson and Zaragoza 2009).

    The library bm25s does it. Passages that share no word with the query are not found.

    Raises:
        InputError: where bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise InputError("a search needs bm25s, which is not installed: pip install 'moe_gpt[search]'") from None
    index = bm25s.BM25()
    index.index([words(passage) for passage in passages], show_progress=False)

    def find(query: str, n: int) -> list[int]:
        asked = [word for word in words(query) if word in index.vocab_dict]
        if not asked:
            return []
        places, scores = index.retrieve([asked], k=min(n, len(passages)), show_progress=False)
        return [place for place, score in zip(places[0].tolist(), scores[0], strict=True) if score > 0]

    return find


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; names such as ``readLine`` and ``read_line`` are two words."""
    split = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text).replace("_", " ")
    return re.findall(r"\w+", split.lower())


def _passages(folder: Path) -> Iterable[tuple[str, str]]:
    """Yield the file's name and each passage of some hundred characters; a paragraph stays whole where it can."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md", ".rst", ".py")):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            raise InputError(f"{path} cannot be searched: {error}") from None
        for passage in _cut(re.split(r"\n\s*\n", text)):
            yield str(path.relative_to(folder)), passage


def _cut(paragraphs: Sequence[str]) -> Iterable[str]:
    """Yield paragraphs in one line each, long ones in pieces."""
    for paragraph in map(" ".join, (paragraph.split() for paragraph in paragraphs)):
        for start in range(0, len(paragraph), PASSAGE):
            yield paragraph[start : start + PASSAGE]
