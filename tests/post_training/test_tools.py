"""Tools: right results, and answers to whatever a model may write."""

from __future__ import annotations

import pytest

from moe_gpt.errors import InputError
from moe_gpt.post_training.tools import CALCULATOR, MOST_CHARACTERS, Call, Tool, calculate, make_search, run_tool, words

TOOLS = {"calculator": CALCULATOR}


@pytest.mark.parametrize(
    ("expression", "value"),
    [("12*7", "84"), (" 3 + 4 * 5 ", "23"), ("(3+4)*5", "35"), ("-7//2", "-4"), ("7 % 4", "3"), ("--2", "2")],
)
def test_the_calculator_knows_whole_numbers(expression, value):
    """As Python does."""
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "9**9**9",
        "1/2",
        "1 if 2 else 3",
        "True+1",
        "__import__('os')",
        "2.5*2",
        "'a'*9",
        "x",
        "1<<9",
        "f(1)",
        "1\n2",
        "(" * 31 + "1" + ")" * 30,
        "1j",
        "\0",
        "1" * 65,
        "1//0",
        "1%0",
        "[1][0]",
    ],
)
def test_what_is_no_sum_is_an_error_that_the_model_reads(expression):
    """Nothing is evaluated, and nothing grows beyond the digits that were written."""
    assert calculate(expression).startswith("error: ")


def test_parentheses_are_no_problem_for_the_stack():
    """Sixty-four characters cannot nest deep enough."""
    assert calculate("(" * 31 + "1" + ")" * 31) == "1"
    assert calculate("-" * 63 + "1") == "-1"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (Call("shell", {"expression": "1"}), "no tool 'shell'"),
        (Call("calculator", {}), "takes one text, expression"),
        (Call("calculator", {"expression": 7}), "takes one text, expression"),
        (Call("calculator", {"expression": "1", "more": "2"}), "takes one text, expression"),
    ],
)
def test_a_wrong_call_is_an_error_that_the_model_reads(call, text):
    """It names what there is."""
    assert text in run_tool(TOOLS, call)


def test_a_long_result_is_cut():
    """The context of a small model is short."""
    shown = run_tool({"long": Tool("long", "query", lambda query: "a" * 5000)}, Call("long", {"query": "x"}))
    assert len(shown) == MOST_CHARACTERS
    assert shown.endswith("...")


def test_search_finds_the_passage(tmp_path):
    """By words that are parts of names too, with the file that it stands in."""
    pytest.importorskip("bm25s")
    (tmp_path / "birds.txt").write_text("The robin sings.\n\nThe swift sleeps in the air.")
    (tmp_path / "code.py").write_text("def readLine(): pass\n\n\ndef write_all(): pass")
    search = make_search(tmp_path)
    assert run_tool({"search": search}, Call("search", {"query": "Who sleeps?"})).startswith("birds.txt: The swift")
    assert search.run("line").startswith("code.py: def readLine")
    assert search.run("elephants") == search.run("") == "nothing found"
    assert words("readLine read_line") == ["read", "line", "read", "line"]


def test_a_folder_without_texts_is_an_error(tmp_path):
    """It names the folder."""
    pytest.importorskip("bm25s")
    with pytest.raises(InputError, match="has no files"):
        make_search(tmp_path)
    with pytest.raises(InputError, match=r"^search=.*nowhere must be a folder, and there is none of that name$"):
        make_search(tmp_path / "nowhere")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bad\.txt cannot be searched"):
        make_search(tmp_path)
    with pytest.raises(InputError, match="must be a folder, and there is none"):
        make_search(tmp_path / "bad.txt")
