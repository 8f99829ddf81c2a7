"""From messages to tokens, with a mask of what the assistant said.

A turn is ChatML: ``<|im_start|>role``, a line end, the content, ``<|im_end|>``, a line end. A tool call is Hermes's
JSON between ``<tool_call>`` and ``</tool_call>``. Marks are special tokens, and everything else is encoded as text:
a mark that a user spells stays text. Header and content are encoded apart and contents are stripped, so that the
tokens of a header do not depend on what follows, and turns that are added never change the tokens before them.

A message is a mapping with ``role`` and ``content`` and, of an assistant, perhaps ``tool_calls``, each with
``{"function": {"name": ..., "arguments": {...}}}`` as OpenAI and Hugging Face have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_gpt.data.packing import Rendered
from moe_gpt.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
PAD, TURN_START, TURN_END, CALL_START, CALL_END = SPECIAL_TOKENS = (
    "<|pad|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>",
)  # fmt: skip

_TURNS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}GENERATION"
    "{{ (message.content or '') | trim }}"
    "{% for each in message.tool_calls or [] %}{% set call = each.function or each %}"
    "{{ '<tool_call>{\"name\": ' + (call.name | tojson) + ', \"arguments\": ' }}"
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}"
    "{{ '}</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}ENDED"
    "{% else %}{{ (message.content or '') | trim + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATE = _TURNS.replace("GENERATION", "").replace("ENDED", "")
"""The rendering as a Jinja template, for other programs."""
TRAINING_TEMPLATE = _TURNS.replace("GENERATION", "{% generation %}").replace("ENDED", "{% endgeneration %}")
"""The same with the tag that gives transformers the mask of the answers. Some programs cannot read this tag."""

Message = Mapping[str, Any]


def render(messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = False) -> Rendered:
    """Return the tokens of a conversation. The answers' are those of a turn's content, its calls and its end.

    Args:
        tokenizer: knows the special tokens.
        add_generation_prompt: end with the header of an answer that is to be generated.
    """
    ids: list[int] = []
    is_answer: list[bool] = []
    for message in messages:
        header, content = _header(message["role"], tokenizer), _content(message, tokenizer)
        end = tokenizer.encode("\n")
        ids += [*header, *content, *end]
        is_assistant = message["role"] == "assistant"
        is_answer += [False] * len(header) + [is_assistant] * len(content) + [False] * len(end)
    if add_generation_prompt:
        header = _header("assistant", tokenizer)
        ids += header
        is_answer += [False] * len(header)
    return Rendered(ids, is_answer)


def can_chat(stage: str | None, tokenizer: Tokenizer) -> bool:
    """Return whether a run's model knows ``TEMPLATE``: it is of a stage after pre-training, and has the marks."""
    return stage is not None and tokenizer.special_id(TURN_START) is not None


def mark(token: str, tokenizer: Tokenizer) -> int:
    """Return the id of a special token of conversations."""
    index = tokenizer.special_id(token)
    if index is None:
        raise ValueError(f"the tokenizer must have the special token {token}; Tokenizer.with_special_tokens adds it")
    return index


def plain_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of tokens without the special ones."""
    special = set(tokenizer.special_tokens().values())
    return tokenizer.decode([token for token in ids if token not in special])


def _header(role: str, tokenizer: Tokenizer) -> list[int]:
    return [mark(TURN_START, tokenizer), *tokenizer.encode(f"{role}\n")]


def _content(message: Message, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a turn after its header, with its end."""
    ids = tokenizer.encode((message.get("content") or "").strip())
    for call in message.get("tool_calls") or ():
        ids += [mark(CALL_START, tokenizer), *tokenizer.encode(spell_call(call)), mark(CALL_END, tokenizer)]
    return [*ids, mark(TURN_END, tokenizer)]


def spell_call(call: Mapping[str, Any]) -> str:
    """Return a tool call as Hermes's JSON."""
    function = call["function"]
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)


def read_calls(ids: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the tool calls in an answer's tokens; what is between the marks and is no call is left out."""
    start, end = tokenizer.special_id(CALL_START), tokenizer.special_id(CALL_END)
    calls, rest = list[dict[str, Any]](), list(ids)
    while start is not None and end is not None and start in rest and end in rest[rest.index(start) :]:
        first = rest.index(start)
        last = rest.index(end, first)
        calls += _parsed(tokenizer.decode(rest[first + 1 : last]))
        rest = rest[last + 1 :]
    return calls


def _parsed(text: str) -> list[dict[str, Any]]:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return []
    is_call = isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
    return [{"function": {"name": call["name"], "arguments": call["arguments"]}}] if is_call else []
