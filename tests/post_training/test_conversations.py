"""Rows of jsonl files: which are read, and what the error for the others says."""

from __future__ import annotations

import json

import pytest

from moe_gpt.errors import InputError
from moe_gpt.post_training.conversations import read_conversations, read_pairs, read_prompts

ASK, ANSWER = {"role": "user", "content": "What is 6 times 7?"}, {"role": "assistant", "content": "It is 42."}
FUNCTION = {"name": "calculator", "arguments": '{"expression": "6*7"}'}


@pytest.fixture
def file(tmp_path):
    """Write rows to a file; texts are written as they are."""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return [path]

    return write


def test_one_dialogue_with_a_call_is_read_the_same_in_five_spellings(file):
    """Content null, empty or missing, arguments as text or object, fields that a table has padded with null."""
    call = {"id": "call_1", "type": "function", "function": FUNCTION}
    as_object = {**call, "function": {**FUNCTION, "arguments": {"expression": "6*7"}}}
    tool = {"role": "tool", "tool_call_id": "call_1", "content": "42"}
    padded = [{**turn, "tool_calls": None, "name": None} for turn in (ASK, tool, ANSWER)]
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": [as_object]},
    ]
    rows = [{"messages": [ASK, turn, tool, ANSWER]} for turn in turns]
    rows.append({"messages": [padded[0], {**turns[0], "name": None}, *padded[1:]]})
    found = read_conversations(file(*rows)).conversations
    assert all(messages == found[0] for messages in found)
    assert found[0][1]["tool_calls"][0]["function"]["arguments"] == {"expression": "6*7"}


def test_parts_are_joined_without_anything_between_them(file):
    """As OpenAI's clients write texts."""
    parts = [{"type": "text", "text": "What is 6 "}, {"type": "text", "text": "times 7?"}]
    rows = [{"messages": [{"role": "user", "content": parts}, ANSWER]}, {"messages": [ASK, ANSWER]}]
    first, second = read_conversations(file(*rows)).conversations
    assert first == second


def test_sharegpts_form_gives_the_same_messages_and_is_counted(file):
    """Whichever of its names of roles a row has; several forms may be in one file."""
    value = {"conversations": [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": "It is 42."}]}
    mixed = {"conversations": [{"from": "user", "value": ASK["content"]}, {"from": "assistant", "value": "It is 42."}]}
    rows = [{"messages": [ASK, ANSWER]}, value, mixed, {"conversations": [ASK, ANSWER]}]
    found = read_conversations(file(*rows))
    assert all(messages == [ASK, ANSWER] for messages in found.conversations)
    assert list(found.n_of_form.values()) == [1, 3]


def test_a_question_at_the_end_is_kept(file):
    """It teaches nothing."""
    assert len(read_conversations(file({"messages": [ASK, ANSWER, ASK]})).conversations[0]) == 3


def said(role, content):
    """Return a message."""
    return {"role": role, "content": content}


SYSTEM = said("system", "Be short.")
BAD = {
    "an empty answer": ([ASK, said("assistant", "")], "messages.1.content must be an answer, got an empty text"),
    "a blank answer": ([ASK, said("assistant", "  \n ")], "no answer to learn from"),
    "an empty first answer": ([ASK, said("assistant", ""), ASK, ANSWER], "messages.1.content must be an answer"),
    "only a system turn": ([SYSTEM], "messages must have an assistant turn, got none: no answer to learn from"),
    "no turns": ([], "messages must be a list with at least one turn"),
    "no list": ("hello", "messages must be a list"),
    "an answer to nothing": (
        [SYSTEM, ANSWER],
        "begin with a user turn, perhaps after a system turn, got the",
    ),
    "two system turns": ([SYSTEM, SYSTEM, ASK, ANSWER], "messages.1 must not be a system turn"),
    "a late system turn": ([ASK, SYSTEM, ANSWER], "messages.1 must not be a system turn"),
    "an unknown role": ([said("human", "a"), ANSWER], "messages.0.role must be one of system, user, assistant, tool"),
    "null of a user": ([said("user", None), ANSWER], "messages.0.content must be text, got null"),
    "null of an answer": ([ASK, said("assistant", None)], "messages.1.content must be text, got null"),
    "a picture": ([said("user", [{"type": "image_url"}]), ANSWER], "messages.0.content.0 must be a text part"),
    "half a pair": ([said("user", "\ud800"), ANSWER], "half of a surrogate pair"),
    "a weight": ([ASK, {**ANSWER, "weight": 0}], "messages.1.weight is not read here"),
    "arguments of no object": (
        [ASK, {"role": "assistant", "tool_calls": [{"function": {**FUNCTION, "arguments": "[1]"}}]}],
        "it must be a JSON object",
    ),
    "arguments of no JSON": (
        [ASK, {"role": "assistant", "tool_calls": [{"function": {**FUNCTION, "arguments": "not json"}}]}],
        "messages.1.tool_calls.0.function.arguments: it must be a JSON object in one line",
    ),
    "arguments with a key twice": (
        [ASK, {"role": "assistant", "tool_calls": [{"function": {**FUNCTION, "arguments": '{"a": 1, "a": 2}'}}]}],
        "messages.1.tool_calls.0.function.arguments: the key 'a' is given twice",
    ),
    "a user's call": ([{**ASK, "tool_calls": [{"function": FUNCTION}]}, ANSWER], "is for the assistant"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_one_error_with_file_row_and_cause(file, kind):
    """Here the second row."""
    messages, cause = BAD[kind]
    with pytest.raises(InputError) as error:
        read_conversations(file({"messages": [ASK, ANSWER]}, {"messages": messages}))
    assert "rows.jsonl row 2: " in str(error.value)
    assert cause in str(error.value)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"messages": [], "messages": []}', "the key 'messages' is given twice"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "the key 'content' is given twice"),
        ('{"messages": [{"role": "user", "role": "assistant"}]}', "the key 'role' is given twice"),
        ('{"messages": NaN}', "NaN is no JSON value"),
        ("[1]", "it must be a JSON object, got [1]"),
        ("{", "it must be a JSON object in one line"),
        ('{"text": "a"}', "it must have messages, a list of role and content, got the keys text"),
        ('{"messages": [], "conversations": []}', "it must have messages or conversations, got both"),
    ],
)
def test_json_is_read_strictly(file, text, cause):
    """What another reader would take the last of, or guess, is an error."""
    with pytest.raises(InputError, match="row 1: ") as error:
        read_conversations(file(text))
    assert cause in str(error.value)


@pytest.mark.parametrize("rows", [(), ("", "  ")])
def test_a_file_without_rows_is_an_error(file, rows):
    """It names the file."""
    with pytest.raises(InputError, match="rows.jsonl has no rows"):
        read_conversations(file(*rows))


def test_pairs_and_prompts_are_texts_or_messages(file):
    """Both forms give the same."""
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c", "answer": "b"},
        {"prompt": [said("user", "a")], "chosen": [said("assistant", "b")], "rejected": "c", "answer": "b"},
    ]
    pairs, prompts = read_pairs(file(*rows)), read_prompts(file(*rows))
    assert pairs[0][:3] == pairs[1][:3] == ([said("user", "a")], [said("assistant", "b")], [said("assistant", "c")])
    assert prompts[0][:2] == prompts[1][:2] == ([said("user", "a")], "b")
    assert prompts[1].place.endswith("rows.jsonl row 2")


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected must differ"),
        ({"prompt": "a", "chosen": "b"}, "rejected is missing; the row has prompt, chosen"),
        ({"prompt": "a", "chosen": [said("user", "b")], "rejected": "c"}, "chosen must be assistant turns after the"),
        ({"prompt": "a", "chosen": "b", "rejected": [said("user", "a")]}, "after the prompt, got none"),
        ({"prompt": "a", "chosen": [said("user", "x"), ANSWER], "rejected": "c"}, "after the prompt, got user"),
        ({"prompt": [said("user", "a"), ANSWER], "chosen": "b", "rejected": "c"}, "prompt must end with a turn that"),
        ({"prompt": [said("system", "a")], "chosen": "b", "rejected": "c"}, "must begin with a user turn"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected.content must be an answer"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "rejected": "b"}', "the key 'rejected' is given twice"),
    ],
)
def test_a_bad_pair_is_an_error_with_its_row(file, row, cause):
    """As for conversations."""
    with pytest.raises(InputError, match="row 1: ") as error:
        read_pairs(file(row))
    assert cause in str(error.value)


def test_a_prompt_needs_an_answer_that_is_not_blank(file):
    """Else a model that says nothing would be right."""
    with pytest.raises(InputError, match="row 1: answer must be a text that is not blank"):
        read_prompts(file({"prompt": "a", "answer": " "}))


def test_a_prompt_that_answers_repeat_is_theirs_once(file):
    """As in UltraFeedback, whose answers are whole conversations."""
    answers = {key: [said("user", "a"), said("assistant", key)] for key in ("chosen", "rejected")}
    (pair,) = read_pairs(file({"prompt": "a", **answers}))
    assert [message["content"] for message in (*pair.prompt, *pair.chosen, *pair.rejected)] == [
        "a",
        "chosen",
        "rejected",
    ]
