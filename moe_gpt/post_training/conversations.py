"""Rows of jsonl files, checked: conversations, pairs of answers, and prompts with a right answer.

A conversation is ``{"messages": [{"role": ..., "content": ...}, ...]}`` as OpenAI and Hugging Face write it, with tool
calls; or ``{"conversations": [{"from": "human", "value": ...}, ...]}`` as ShareGPT has it. The first row that cannot
be used is one error with file and row. A system turn may come first, then a user turn. A user turn at the end is
read, and teaches nothing. An answer that is empty and calls no tool is an error, because it would teach to end at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from moe_gpt.errors import InputError, shown
from moe_gpt.post_training.chat import ROLES, Message

_ALIASES = {"human": "user", "gpt": "assistant", "function": "tool"}
"""ShareGPT's names of roles."""
_UNREAD = ("function_call", "weight")
"""Keys of a message that would change what it teaches."""
_FORMS = {"messages": "OpenAI's form (messages)", "conversations": "ShareGPT's form (conversations)"}


class Found(NamedTuple):
    """The conversations of files."""

    conversations: list[list[Message]]
    places: list[str]
    """File and row of each."""
    n_of_form: Counter[str]
    """How many rows came in each form."""


class Pair(NamedTuple):
    """Two answers to a prompt, of which one is better."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    place: str = ""
    """File and row."""


class Prompt(NamedTuple):
    """A prompt and the right answer."""

    prompt: list[Message]
    answer: str
    place: str = ""
    """File and row."""


class Unfit(Exception):  # noqa: N818 (its reader adds file and row)
    """A row that cannot be used, and why."""


_Row = TypeVar("_Row")


def read_conversations(paths: Sequence[Path]) -> Found:
    """Return the conversations of jsonl files.

    Raises:
        InputError: naming file and row of the first one that cannot be used; or a file without rows.
    """
    found, forms = [], Counter[str]()
    for place, row in read_rows(paths, dict):
        form = next((form for form in _FORMS if form in row), "messages")
        found.append((place, _of_row(place, checked_conversation, row)))
        forms[_FORMS[form]] += 1
    return Found([messages for _, messages in found], [place for place, _ in found], forms)


def read_dataset(rows: Iterable[Mapping[str, Any]], name: str) -> Found:
    """Return the conversations in the column ``messages`` of a dataset.

    Raises:
        InputError: naming the row of the first one that cannot be used; or a dataset without rows.
    """
    places, conversations = list[str](), list[list[Message]]()
    for number, row in enumerate(rows, 1):
        places.append(f"dataset {name} row {number}")
        conversations.append(_of_row(places[-1], checked_conversation, row))
    if not conversations:
        raise InputError(f"dataset {name} has no rows")
    return Found(conversations, places, Counter())


def checked_messages(messages: Any) -> list[Message]:
    """Return messages that ask for an answer, with texts of several parts joined.

    Answers in them may be empty, as a model's may be.

    Raises:
        InputError: naming the first message and key that cannot be used.
    """
    try:
        found = _messages(messages)
        _check_order([message["role"] for message in found])
    except Unfit as error:
        raise InputError(str(error)) from None
    return found


def read_pairs(paths: Sequence[Path]) -> list[Pair]:
    """Return the rows ``{"prompt": ..., "chosen": ..., "rejected": ...}`` of files: texts or lists of messages."""
    return [pair._replace(place=place) for place, pair in read_rows(paths, _pair)]


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """Return the rows ``{"prompt": ..., "answer": "..."}`` of jsonl files; the prompt is a text or messages."""
    return [prompt._replace(place=place) for place, prompt in read_rows(paths, _prompt)]


def read_rows(paths: Sequence[Path], read: Callable[[dict[str, Any]], _Row]) -> Iterator[tuple[str, _Row]]:
    """Yield the place and the contents of each row that is not blank."""
    for path in paths:
        n_rows = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    n_rows += 1
                    place = f"{path} row {number}"
                    yield place, _of_row(place, lambda text: read(_parsed(text)), line)
        if not n_rows:
            raise InputError(f"{path} has no rows; give a jsonl file with a JSON object in each line")


def _of_row(place: str, read: Callable[[Any], _Row], value: Any) -> _Row:
    try:
        return read(value)
    except Unfit as error:
        raise InputError(f"{place}: {error}") from None


def _under(key: str, read: Callable[[Any], _Row], value: Any) -> _Row:
    """Return what is read at a key, which an error then names."""
    try:
        return read(value)
    except Unfit as error:
        raise Unfit(f"{key}: {error}") from None


def require(holds: object, text: str) -> None:
    """Raise ``Unfit`` unless something holds."""
    if not holds:
        raise Unfit(text)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Unfit(f"it must be UTF-8 text: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        found = shown(line[:60].decode(errors="replace").strip())
        raise Unfit(f"it must be a JSON object in one line (jsonl has one in each), got {found}: {error}") from None
    require(isinstance(row, dict), f"it must be a JSON object, got {shown(row)}")
    return row


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, n in Counter(key for key, _ in pairs).items():
        require(n == 1, f"the key {key!r} is given twice in one object; keep one of them")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise Unfit(f"{name} is no JSON value")


def checked_conversation(row: Mapping[str, Any]) -> list[Message]:
    """Return the turns of a row with messages or conversations; raise ``Unfit`` where they cannot be used."""
    messages = _messages(_turns(row), ": no answer to learn from")
    roles = [message["role"] for message in messages]
    require("assistant" in roles, "messages must have an assistant turn, got none: no answer to learn from")
    _check_order(roles)
    return _with_answers(messages, [f"messages.{index}" for index in range(len(messages))])


def _messages(turns: Any, why: str = "") -> list[Message]:
    """Return the turns of a conversation; ``why`` ends the message where there is none."""
    text = f"messages must be a list with at least one turn, got {shown(turns)}{why}"
    require(isinstance(turns, (list, tuple)) and turns, text)
    return [_message(turn, f"messages.{index}") for index, turn in enumerate(turns)]


def _with_answers(messages: list[Message], keys: Sequence[str]) -> list[Message]:
    for message, key in zip(messages, keys, strict=True):
        _check_answer(message, key)
    return messages


def _check_answer(message: Message, key: str) -> None:
    """Raise an error for an answer that would teach to end at once."""
    text = f"{key}.content must be an answer, got an empty text: no answer to learn from"
    require(message["role"] != "assistant" or message.get("tool_calls") or message["content"].strip(), text)


def _turns(row: Mapping[str, Any]) -> Any:
    """Return the list of turns, those of ShareGPT's form with role and content."""
    given = [form for form in _FORMS if form in row]
    keys = ", ".join(row) or "none"
    require(given, f"it must have messages, a list of role and content, got the keys {keys}")
    require(len(given) == 1, "it must have messages or conversations, got both")
    turns = row[given[0]]
    is_list_of_sharegpt = given[0] == "conversations" and isinstance(turns, list)
    return [_renamed(turn) for turn in turns] if is_list_of_sharegpt else turns


def _renamed(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role = str(turn["from"])
    return rest | {"role": _ALIASES.get(role, role), "content": turn.get("value")}


def _message(turn: Any, key: str) -> Message:
    """Return a turn with role, content and perhaps tool calls."""
    require(isinstance(turn, dict), f"{key} must be an object with role and content, got {shown(turn)}")
    role, calls = turn.get("role"), turn.get("tool_calls")
    require(role in ROLES, f"{key}.role must be one of {', '.join(ROLES)}, got {shown(role)}")
    for name in _UNREAD:
        require(turn.get(name) is None, f"{key}.{name} is not read here, got {shown(turn.get(name))}; leave it out")
    if calls:
        return _message_with_calls(turn, calls, key)
    return {"role": role, "content": checked_text(turn.get("content"), f"{key}.content")}


def _message_with_calls(turn: dict[str, Any], calls: Any, key: str) -> Message:
    role = turn["role"]
    require(role == "assistant", f"{key}.tool_calls is for the assistant, got them from {role}")
    require(isinstance(calls, list), f"{key}.tool_calls must be a list, got {shown(calls)}")
    content = checked_text(turn.get("content") or "", f"{key}.content")
    read = [_call(call, f"{key}.tool_calls.{index}.function") for index, call in enumerate(calls)]
    return {"role": role, "content": content, "tool_calls": read}


def checked_text(content: Any, key: str) -> str:
    """Return a content that is text, or a list of text parts, which are joined without anything between them."""
    if isinstance(content, list):
        return "".join(_part(part, f"{key}.{index}") for index, part in enumerate(content))
    require(isinstance(content, str), f"{key} must be text, got {_shown(content)}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise Unfit(f"{key} must be valid Unicode, got half of a surrogate pair") from None
    return content


def _shown(value: Any) -> str:
    return "null" if value is None else shown(value)


def _part(part: Any, key: str) -> str:
    text = f'{key} must be a text part, {{"type": "text", "text": ...}}, got {shown(part)}'
    require(isinstance(part, dict) and part.get("type") == "text", text)
    return checked_text(part.get("text"), f"{key}.text")


def _call(call: Any, key: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    text = f"{key} must be an object with name and arguments, got {shown(function)}"
    require(isinstance(function, dict), text)
    name, arguments = function.get("name"), function.get("arguments")  # type: ignore[union-attr]
    require(isinstance(name, str), text)
    if isinstance(arguments, str):  # as OpenAI has them
        arguments = _under(f"{key}.arguments", _parsed, arguments.encode("utf-8", "surrogatepass"))
    require(isinstance(arguments, dict), f"{key}.arguments must be a JSON object, got {shown(arguments)}")
    checked_text(json.dumps([name, arguments], ensure_ascii=False), key)
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _check_order(roles: Sequence[str]) -> None:
    """Raise an error for a system turn that is not the first one, and for an answer to nothing."""
    for index, role in enumerate(roles[1:], 1):
        require(role != "system", f"messages.{index} must not be a system turn; one may be the first turn")
    first = [*roles, "system"][roles[0] == "system"]
    text = f"messages must begin with a user turn, perhaps after a system turn, got the role {first}"
    require(first == "user", text)


def _pair(row: Mapping[str, Any]) -> Pair:
    prompt = _asked(row)
    chosen, rejected = (_answered(row, key, prompt) for key in ("chosen", "rejected"))
    require(chosen != rejected, "chosen and rejected must differ, got the same answer twice")
    return Pair(prompt, chosen, rejected)


def _prompt(row: Mapping[str, Any]) -> Prompt:
    answer = checked_text(row.get("answer"), "answer")
    if not answer.strip():
        raise Unfit("answer must be a text that is not blank, or an empty reply would be the right one")
    return Prompt(_asked(row), answer)


def _asked(row: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a prompt, which an assistant turn may follow."""
    prompt = _spoken(row, "prompt", "user")
    roles = [message["role"] for message in prompt]
    _check_order(roles)
    require(roles[-1] != "assistant", "prompt must end with a turn that waits for an answer, got an assistant turn")
    return prompt


def _answered(row: Mapping[str, Any], key: str, prompt: Sequence[Message]) -> list[Message]:
    """Return the messages of an answer, without the prompt that some data sets repeat before it."""
    answer = _spoken(row, key, "assistant")
    if answer[: len(prompt)] == prompt:
        answer = answer[len(prompt) :]
    _check_answering(key, [message["role"] for message in answer])
    return answer


def _check_answering(key: str, roles: Sequence[str]) -> None:
    """Raise an error for turns that are no answer."""
    is_answer = roles[:1] == ["assistant"] and set(roles) <= {"assistant", "tool"}
    require(is_answer, f"{key} must be assistant turns after the prompt, got {', '.join(roles) or 'none'}")


def _spoken(row: Mapping[str, Any], key: str, role: str) -> list[Message]:
    """Return the messages of a key, which has a text of this role, or a list of messages."""
    require(key in row, f"{key} is missing; the row has {', '.join(row)}")
    value = row[key]
    if isinstance(value, list) and value:
        keys = [f"{key}.{index}" for index in range(len(value))]
    else:
        require(isinstance(value, str), f"{key} must be a text or a list of messages, got {_shown(value)}")
        value, keys = [{"role": role, "content": value}], [key]
    return _with_answers(list(map(_message, value, keys)), keys)
