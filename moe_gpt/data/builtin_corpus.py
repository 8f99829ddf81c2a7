"""Real text that ships with every Python, so that the smallest run works offline.

*prose* is the language reference of ``pydoc_data`` and the docstrings of the standard library. *code* is the source
code of the standard library without those docstrings, so no text is in both. Tests and generated tables are left out.
A module's prose and code have the same split key, so both are on the same side of the train/validation split. The text
differs a little between Python versions; the run records its fingerprint.
"""

from __future__ import annotations

import ast
import codecs
import importlib
import inspect
import itertools
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe_gpt.data.document import Document
from moe_gpt.errors import InputError

_LEFT_OUT_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings",
    "_bundled", "__phello__", "lib-dynload",
}  # fmt: skip
_LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")


def source_files() -> list[Path]:
    """Return the standard library's source files, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = itertools.filterfalse(_is_left_out, folders)  # so that the walk skips large ones
        files += [Path(folder, name) for name in itertools.filterfalse(_is_left_out, names) if name.endswith(".py")]
    if len(files) < 100:
        raise InputError(
            f"builtin needs the standard library's sources, got {len(files)} .py files under {root}; "
            "use a Python with its sources on disk, or give the source files: or dataset:"
        )
    return sorted(files)


def _is_left_out(name: str) -> bool:
    return name in _LEFT_OUT_FOLDERS or name.startswith(_LEFT_OUT_PREFIXES)


def iterate_builtin(kind: str) -> Iterator[Document]:
    """Yield the documents of ``prose`` or ``code``, in a fixed order."""
    if kind == "prose":
        yield from _reference_topics()
    for module, source, tree in parsed_modules():
        text = collect_docstrings(tree, module) if kind == "prose" else remove_docstrings(source, tree)
        if text.strip():
            yield Document(text, module)


def parsed_modules() -> Iterator[tuple[str, bytes, ast.Module]]:
    """Yield the name of each module of the standard library, its source and its syntax tree."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in source_files():
        source = path.read_bytes()
        tree = _parse(source)
        if tree is not None:
            yield ".".join(path.relative_to(root).with_suffix("").parts), source, tree


def _parse(source: bytes) -> ast.Module | None:
    """Return the syntax tree; None for the few files of the standard library that are invalid on purpose."""
    try:
        source.decode("utf-8")
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _reference_topics() -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise InputError(
            "builtin: prose needs Python's module pydoc_data.topics, which this Python lacks; "
            "use a Python with its documentation, or give the source files: or dataset:"
        ) from None
    for name in sorted(topics):
        yield Document(topics[name].strip() + "\n", f"topic {name}")


def documented_nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yield each module, class and function with a docstring, and its dotted name within the module."""
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, name = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
            if ast.get_docstring(node, clean=False) is not None:
                yield node, name
        stack += [(child, name) for child in reversed(list(ast.iter_child_nodes(node)))]


def collect_docstrings(tree: ast.Module, module: str) -> str:
    """Return all docstrings of a module in source order, each under the dotted name of its object."""
    parts = []
    for node, name in documented_nodes(tree):
        text = inspect.cleandoc(node.body[0].value.value).strip()  # type: ignore[attr-defined]
        if text:
            parts.append(f"{module}{name}\n\n{text}\n")
    return "\n\n".join(parts)


def remove_docstrings(source: bytes, tree: ast.Module) -> str:
    """Return the source without its docstrings. A body that has nothing else becomes ``pass``."""
    source = source.removeprefix(codecs.BOM_UTF8)  # positions in the tree do not count it
    for start, end, replacement in sorted(_edits(source, tree), reverse=True):
        if not replacement:
            separator = re.compile(rb"[ \t]*;[ \t]*").match(source, end)
            start, end = _whole_line(source, start, separator.end() if separator else end)
        source = source[:start] + replacement + source[end:]
    return source.decode("utf-8")


def _edits(source: bytes, tree: ast.Module) -> Iterator[tuple[int, int, bytes]]:
    """Yield the byte range of each docstring, and its replacement."""
    line_starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    for node, _ in documented_nodes(tree):
        body = node.body  # type: ignore[attr-defined]
        start = line_starts[body[0].lineno - 1] + body[0].col_offset
        end = line_starts[body[0].end_lineno - 1] + body[0].end_col_offset
        stands_alone = not isinstance(node, ast.Module) and len(body) == 1
        yield start, end, b"pass" if stands_alone else b""


def _whole_line(source: bytes, start: int, end: int) -> tuple[int, int]:
    """Widen a range to whole lines, if nothing else is on them."""
    line_start = source.rfind(b"\n", 0, start) + 1
    line_end = source.find(b"\n", end)
    line_end = len(source) if line_end < 0 else line_end + 1
    if source[line_start:start].strip() or source[end:line_end].strip():
        return start, end
    return line_start, line_end
