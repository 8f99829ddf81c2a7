"""From a loaded model to a conversation with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moe_gpt.errors import InputError
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.generate import checked_context
from moe_gpt.inference.request import Beside
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.post_training.chat import TEMPLATE, Message, can_chat, render
from moe_gpt.post_training.conversations import checked_messages
from moe_gpt.post_training.dialogue import Dialogue
from moe_gpt.post_training.eyes import has_pictures
from moe_gpt.post_training.tools import CALCULATOR, Tool, make_search
from moe_gpt.serving.chat import ChatTemplate
from moe_gpt.vision.seeing import SeeingModel

if TYPE_CHECKING:
    from moe_gpt.api.loaded import LanguageModel

GREEDY = SamplingConfig(temperature=0)


def make_dialogue(
    loaded: LanguageModel,
    tools: Sequence[str | Tool] = (),
    max_new_tokens: int = 200,
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
    context: int | None = None,
) -> Dialogue:
    """Return what answers messages.

    Args:
        tools: ``calculator``, ``search=FOLDER``, or tools of your own.
        context: positions of messages and answer together; by default the longest that the model was trained on.

    Raises:
        InputError: for a model that has no chat template, or tools that it cannot have.
    """
    tokenizer = loaded.require_tokenizer()
    if isinstance(tools, str | Tool):
        raise InputError(f"tools must be a list, such as ['calculator'], got {tools!r} alone; put it into a list")
    found = [as_tool(tool) for tool in tools]
    way = _sees(loaded) if isinstance(loaded.model, SeeingModel) else _reads(loaded)
    if found and not way.knows_tools:
        raise InputError(f"tools need the chat template that moe-gpt finetune writes; {loaded.path} has another")
    context = checked_context(loaded.model, context or loaded.context)
    return Dialogue(
        engine=Engine(loaded.model, n_rows=1, context=context, precision=loaded.precision),
        tokenizer=tokenizer,
        encode=way.encode,
        ends=way.ends,
        beside=way.beside,
        tools={tool.name: tool for tool in found},
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
    )


class _Way(NamedTuple):
    """How a model is given messages."""

    encode: Callable[[Sequence[Message]], list[int]]
    ends: list[int]
    knows_tools: bool
    beside: Callable[[Sequence[Message]], Beside | None] = lambda _: None


def _sees(loaded: LanguageModel) -> _Way:
    """Return that of a model that sees, which has turns or, without a chat template, questions and answers."""
    eyes = loaded.eyes
    return _Way(
        lambda messages: eyes.spell_conversation(messages).ids,
        eyes.ends,
        eyes.has_turns,
        lambda messages: eyes.shown(eyes.spell_conversation(messages)),
    )


def _reads(loaded: LanguageModel) -> _Way:
    template = find_template(loaded, loaded.path)
    if template is None:
        raise InputError(
            f"{loaded.path} has no chat template, so it only continues text (moe-gpt generate); "
            "moe-gpt finetune tiny-chat.yaml --init-from RUN makes a model that can chat"
        )
    return _Way(_encoder(template), _ends(template), template.source == TEMPLATE)


def find_template(loaded: LanguageModel, given: Path) -> ChatTemplate | None:
    """Return the chat template in a model's folder, or else that of a run whose stage has taught it to chat."""
    tokenizer, config = loaded.require_tokenizer(), loaded.run_config
    found = ChatTemplate.find(Path(loaded.path), tokenizer) or ChatTemplate.find(given, tokenizer)
    is_ours = config is not None and can_chat(config.stage, tokenizer)
    return found or (ChatTemplate(TEMPLATE, tokenizer) if is_ours else None)


def _encoder(template: ChatTemplate) -> Callable[[Sequence[Message]], list[int]]:
    """Return what turns messages into tokens; our own template also knows calls of tools."""
    if template.source == TEMPLATE:
        return lambda messages: render(messages, template.tokenizer, add_generation_prompt=True).ids
    return lambda messages: template.encode([(message["role"], message["content"]) for message in messages])


def _ends(template: ChatTemplate) -> list[int]:
    """Return the tokens that end an answer."""
    turn = template.end_of_turn()
    return [template.tokenizer.end_of_text_id] + ([] if turn is None else [turn])


def answer(
    loaded: LanguageModel,
    messages: Sequence[Message],
    tools: Sequence[str | Tool] = (),
    max_new_tokens: int = 200,
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
) -> str:
    """Return the answer to messages, without special tokens.

    With tools, the model's calls are run, and the answer is what it says after their results. Without, a call is the
    answer.

    Args:
        messages: of OpenAI's form: ``[{"role": "user", "content": "..."}]``; for a model that sees, the content of a
            user's message may have parts ``{"type": "image", "image": ...}``, a path, data URL or bytes, and
            ``image_url``. Where they exceed the context, the oldest questions are left out, with a warning.

    Raises:
        InputError: for messages that are no conversation, or a model or tools as in ``make_dialogue``.
    """
    asked = checked_messages(messages) if not has_pictures(messages) else loaded.eyes.take_pictures(messages)
    dialogue = make_dialogue(loaded, tools, max_new_tokens, sampling, seed)
    text = ""
    for piece in dialogue.reply(asked):
        if piece.notice:
            warnings.warn(piece.notice, stacklevel=3)
        text = "" if piece.is_result else text + piece.text
    return text


def as_tool(given: str | Tool) -> Tool:
    """Return a tool by its name.

    Raises:
        InputError: where there is none of that name.
    """
    if isinstance(given, Tool):
        return given
    name, _, folder = str(given).partition("=")
    if given == CALCULATOR.name:
        return CALCULATOR
    if name == "search" and folder:
        return make_search(Path(folder))
    raise InputError(f"tools must be calculator or search=FOLDER, got {given!r}")
