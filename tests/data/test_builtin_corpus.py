"""The corpus that ships with Python: prose and code without a text in both."""

from __future__ import annotations

import ast
import warnings
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

from moe_gpt.data import builtin_corpus
from moe_gpt.data.builtin_corpus import (
    collect_docstrings,
    iterate_builtin,
    remove_docstrings,
    source_files,
)
from moe_gpt.errors import InputError


def without_docstrings(source: str | bytes) -> str:
    """Remove the docstrings of a source given as text or bytes."""
    source = source.encode() if isinstance(source, str) else source
    return remove_docstrings(source, ast.parse(source))


def documented(tree: ast.AST) -> list[ast.AST]:
    """Return the nodes of a tree that have a docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [n for n in ast.walk(tree) if isinstance(n, kinds) and ast.get_docstring(n, clean=False) is not None]


def tree_without_docstrings(source: str | bytes) -> str:
    """Return the syntax tree of a source minus its docstrings, as text: what the result must parse to."""
    tree = ast.parse(source)
    for node in documented(tree):
        node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.dump(tree)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""doc"""\nx = 1\n', "x = 1\n"),
        ('def f(): "doc"\n', "def f(): pass\n"),
        ('def f():\n    """doc"""\n', "def f():\n    pass\n"),
        ('def f():\n    """a\n    b\n    """\n    return 1\n', "def f():\n    return 1\n"),
        ('def f():\n    """doc"""  # why\n    return 1\n', "def f():\n      # why\n    return 1\n"),
        ('def f(x="\u00e9\u4e2d"): "doc"\n', 'def f(x="\u00e9\u4e2d"): pass\n'),
        ('# \u00e9\u4e2d\n"""\u00e9"""\nx = "\u00e9"\n', '# \u00e9\u4e2d\nx = "\u00e9"\n'),
        ('class A:\n    "a"\n    class B:\n        "b"\n        x = 1\n', "class A:\n    class B:\n        x = 1\n"),
        ('@d("x")\nasync def f():\n    "doc"\n    await g()\n', '@d("x")\nasync def f():\n    await g()\n'),
        ('def f():\n    r"""doc\\d"""\n    return 1\n', "def f():\n    return 1\n"),
        ('def f():\n    b"data"\n', 'def f():\n    b"data"\n'),
        ('def f():\n    f"{x}"\n', 'def f():\n    f"{x}"\n'),
        ('def f():\n    x = "text"\n    "no docstring"\n', 'def f():\n    x = "text"\n    "no docstring"\n'),
        ('def f():\n    ("a"\n     "b")\n    return 1\n', "def f():\n    return 1\n"),
        ('def f():\n    "a" \\\n    "b"\n    return 1\n', "def f():\n    return 1\n"),
        ('"""doc"""\r\ndef f():\r\n    """doc\r\n    """\r\n    return 1\r\n', "def f():\r\n    return 1\r\n"),
        ('def f():\n    "doc"\n    "second"\n    return 1\n', 'def f():\n    "second"\n    return 1\n'),
        ('class A:\n\x0c\n    "doc"\n    x = 1', "class A:\n\x0c\n    x = 1"),
        ('"""only a docstring"""', ""),
    ],
)
def test_docstrings_are_cut_out_and_nothing_else(source, expected):
    """A docstring goes with the lines it alone stands on; a body that was nothing else becomes ``pass``."""
    assert without_docstrings(source) == expected
    assert ast.dump(ast.parse(expected)) == tree_without_docstrings(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""doc"""; x = 1\n',
        'def f(): "doc"; return 1\n',
        'def f():\n    "doc"; x = 1; return x\n',
        'def f():\n    "doc";\n    return 1\n',
        'def f():\n    "doc" ; # why\n    return 1\n',
        'def f(): "doc";\n',
        b'\xef\xbb\xbf"""doc"""\nx = 1\n',
        b'\xef\xbb\xbfdef f(): "doc"\n',
        b'"""doc"""\rdef f():\r    """doc"""\r    return 1\r',
        'def f(): \\\n    "doc"\n',
        'def f():\n\t"""doc"""\n\treturn 1\n',
        'class A: "\u00e9\u00e9"\nclass B: "b"\n',
    ],
)
def test_source_without_docstrings_is_the_same_program(source):
    """The result parses to the syntax tree of the source minus its docstrings, however they are written."""
    result = without_docstrings(source).lstrip("\ufeff")
    assert ast.dump(ast.parse(result)) == tree_without_docstrings(source)


@pytest.fixture(scope="module")
def library() -> list[Path]:
    """Return the files of the standard library, looked up once."""
    return source_files()


class Source(NamedTuple):
    """A real file, its syntax tree and what the corpus makes of it."""

    path: Path
    source: bytes
    tree: ast.Module
    code: str


@pytest.fixture(scope="module")
def real_sources(library) -> list[Source]:
    """Return some 30 files from all over the standard library."""
    sample = []
    with warnings.catch_warnings(action="ignore"):
        for path in library[::20]:
            source = path.read_bytes()
            tree = ast.parse(source)
            sample.append(Source(path, source, tree, remove_docstrings(source, tree)))
    return sample


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_real_sources_without_docstrings_are_the_same_programs(real_sources):
    """For files of the standard library the result parses to the same tree minus docstrings."""
    assert 25 <= len(real_sources) <= 40
    for item in real_sources:
        assert ast.dump(ast.parse(item.code)) == tree_without_docstrings(item.source), item.path


def test_no_long_docstring_is_left_in_the_code(real_sources):
    """No docstring of more than 80 characters of a real file is in its code; it is in its prose."""
    n_docstrings = 0
    for item in real_sources:
        prose = collect_docstrings(item.tree, "module")
        for node in documented(item.tree):
            text = ast.get_docstring(node, clean=False)
            if len(text) > 80:
                n_docstrings += 1
                assert text not in item.code, item.path
                assert ast.get_docstring(node).strip() in prose, item.path
    assert n_docstrings > 100


def test_docstrings_are_collected_in_source_order_under_their_names():
    """The prose of a module is its docstrings in order, cleaned, each under its dotted name, without empty ones."""
    source = (
        '"""Module.\n\n    More.\n    """\n'
        "def f():\n    '''F.'''\n    def g():\n        'G.'\n"
        "class A:\n    ''' '''\n    async def m(self):\n        r'''M \\d.'''\n    def n(self): pass\n"
        "if True:\n    def h(): 'H.'\n"
    )
    assert collect_docstrings(ast.parse(source), "pkg.mod") == (
        "pkg.mod\n\nModule.\n\nMore.\n\n\n"
        "pkg.mod.f\n\nF.\n\n\n"
        "pkg.mod.f.g\n\nG.\n\n\n"
        "pkg.mod.A.m\n\nM \\d.\n\n\n"
        "pkg.mod.h\n\nH.\n"
    )


def test_module_without_docstrings_has_no_prose():
    """A module that documents nothing gives empty prose."""
    assert collect_docstrings(ast.parse("x = 1\ndef f(): return 1\n"), "m") == ""


def test_prose_and_code_of_a_module_have_the_same_split_key(monkeypatch, library):
    """A module's two documents carry one key, its dotted name, so that both fall on one side of the split."""
    files = [path for path in library if path.name in ("argparse.py", "bisect.py", "shlex.py")]
    monkeypatch.setattr(builtin_corpus, "source_files", lambda: files)
    prose = [document.split_key for document in iterate_builtin("prose")]
    code = [document.split_key for document in iterate_builtin("code")]
    assert [key for key in prose if not key.startswith("topic ")] == code == ["argparse", "bisect", "shlex"]


def test_prose_begins_with_the_language_reference():
    """The reference topics come first, each a document of its own, in a fixed order."""
    first = list(islice(iterate_builtin("prose"), 5))
    assert all(document.split_key.startswith("topic ") and document.text.strip() for document in first)
    assert first == list(islice(iterate_builtin("prose"), 5))
    assert first == sorted(first, key=lambda document: document.split_key)


def test_code_documents_are_real_files_without_docstrings(monkeypatch, library):
    """A code document is its file's program without docstrings, the one that ``remove_docstrings`` gives."""
    (path,) = [path for path in library if path.name == "bisect.py"]
    monkeypatch.setattr(builtin_corpus, "source_files", lambda: [path])
    (document,) = iterate_builtin("code")
    assert document.text == without_docstrings(path.read_bytes())
    assert "def insort_right" in document.text
    assert "Insert item x in list a" not in document.text


def test_files_that_do_not_parse_are_passed_over(monkeypatch, tmp_path):
    """A file that is not Python, not UTF-8 or empty gives no document and stops nothing."""
    contents = {
        "bad.py": b"def (",
        "empty.py": b"\n",
        "good.py": b"x = 1\n",
        "latin.py": b"# -*- coding: latin-1 -*-\n# \xe9\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(builtin_corpus, "source_files", lambda: sorted(tmp_path.glob("*.py")))
    monkeypatch.setattr(builtin_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [tuple(document) for document in iterate_builtin("code")] == [("x = 1\n", "good")]


def test_tests_and_generated_tables_are_left_out(library):
    """No file of the corpus is a test, a codec table or an installed package; the order is fixed."""
    assert library == sorted(library)
    assert len(library) > 300
    parts = {part for path in library for part in path.parts}
    assert not parts & {"test", "tests", "encodings", "site-packages", "pydoc_data", "__pycache__"}


def test_python_without_sources_is_refused(monkeypatch, tmp_path):
    """Where the standard library has no sources on disk the error says where they were sought and what to do."""
    (tmp_path / "only.py").write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(builtin_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match=rf"builtin .* got 1 \.py files under {tmp_path}; .*files: or dataset:"):
        next(iterate_builtin("code"))
