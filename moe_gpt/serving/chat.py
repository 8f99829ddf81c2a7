"""From messages to tokens, by the chat template that lies beside a model."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.inside import read_json

_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # of training; it writes nothing
_STRIPS = re.compile(r"\|\s*trim\b|\.strip\(")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as transformers writes them, in ``chat_template.jinja`` or ``tokenizer_config.json``.

    Contents are inserted as text: a marker such as <|im_end|> that a user types does not become the token.
    """

    source: str
    tokenizer: Tokenizer
    bos_token: str = ""
    eos_token: str = ""

    @staticmethod
    def find(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Return the template of a model's folder, None where it has none.

        Raises:
            InputError: where it cannot write a conversation of two turns.
        """
        own, config = folder / "chat_template.jinja", "tokenizer_config.json"
        values = read_json(folder, config) if (folder / config).is_file() else {}
        source = own.read_text(encoding="utf-8") if own.is_file() else _default(values.get("chat_template"))
        spelled = {name: _spelling(values.get(name)) for name in ("bos_token", "eos_token")}
        if not isinstance(source, str):
            return None
        found = ChatTemplate(source, tokenizer, **spelled)
        try:
            found.end_of_turn()
        except InputError as error:
            raise InputError(f"{folder}: its chat template cannot be used: {error}") from None
        return found

    def encode(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Return the tokens of a conversation of (role, content), with the beginning of the answer.

        Raises:
            InputError: where the template refuses the conversation.
        """
        content_of = {secrets.token_hex(16): self._clean(content) for _, content in messages}  # a mark for each
        rest = self._render([role for role, _ in messages], list(content_of), add_generation_prompt)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(content_of)})", rest):
            is_content = part in content_of
            ids += self.tokenizer.encode(content_of[part]) if is_content else self._encode_markers(part)
        return ids

    def _clean(self, content: str) -> str:
        """Strip a content where the template does: it sees marks, and cannot strip them."""
        return content.strip() if _STRIPS.search(self.source) else content

    def _encode_markers(self, text: str) -> list[int]:
        return self.tokenizer.encode_with_special_tokens(text) if text else []

    def _render(self, roles: Sequence[str], contents: Sequence[str], add_generation_prompt: bool) -> str:
        extensions = ["jinja2.ext.loopcontrols"]  # as transformers has
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        values = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            template = environment.from_string(_GENERATION.sub("", self.source))
            return template.render(messages=turns, add_generation_prompt=add_generation_prompt, **values)
        except Exception as error:  # a template is a program
            raise InputError(f"the chat template refuses the conversation: {error}") from None

    def end_of_turn(self) -> int | None:
        """Return the special token that follows an answer, None where the template writes none."""
        conversation = [("user", "a"), ("assistant", "")]
        whole = self.encode(conversation, add_generation_prompt=False)
        opened = self.encode(conversation[:1])
        special = set(self.tokenizer.special_tokens().values())
        return next((token for token in whole[len(opened) :] if token in special), None)


def _default(template: Any) -> Any:
    """Return a template, of a list of named ones the default."""
    if not isinstance(template, list):
        return template
    return next((each["template"] for each in template if each.get("name") == "default"), None)


def _spelling(token: Any) -> str:
    """Return how a token of ``tokenizer_config.json`` is spelled; old files have an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""


def _raise(message: str) -> None:
    raise TemplateError(message)
