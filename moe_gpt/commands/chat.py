"""``moe-gpt chat``: talk to a model."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from moe_gpt.commands.generate import (
    DEFAULTS,
    PROMPT,
    SAMPLING,
    SampledModelOptions,
    load_as_told,
    show,
    warn_of_context,
)
from moe_gpt.commands.options import Switch, Whole, Words, flat, read_as
from moe_gpt.config.section import NonNegative
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import wrap

if TYPE_CHECKING:
    from moe_gpt.api.loaded import LanguageModel
    from moe_gpt.inference.request import TokenExperts
    from moe_gpt.post_training.chat import Message
    from moe_gpt.post_training.dialogue import Dialogue, Piece
    from moe_gpt.post_training.eyes import Opened


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The conversation."""

    message: Annotated[str | None, Parameter(group=PROMPT)] = None
    """Answer this message and end. Without it, each line that you type is a message."""
    image: Annotated[Words, Parameter(group=PROMPT)] = ()
    """A picture for a model that sees, shown with the first question: at `<image>` in it, or before it. Repeat the
    option for several."""
    system: Annotated[str | None, Parameter(group=PROMPT)] = None
    """The system's message, before all others."""
    tools: Annotated[Words, Parameter(group=PROMPT)] = ()
    """Tools that the model may call: calculator, search=FOLDER. Repeat the option for several."""
    experts: Annotated[Switch, Parameter(group=PROMPT)] = False
    """Colour each token by the expert that the last layer preferred for it."""
    context: Annotated[Whole | None, Parameter(group=PROMPT)] = None
    """Positions of messages and answer together; by default the longest sequence that the run was trained on."""
    max_new_tokens: Annotated[Whole, Parameter(group=SAMPLING)] = 200
    """Tokens of an answer at most."""
    temperature: Annotated[NonNegative, read_as(NonNegative), Parameter(group=SAMPLING)] = 0.0
    """Divisor of the logits; 0 chooses the most likely token each time."""


def chat(model: str, *, options: ChatOptions = ChatOptions(), sampled: SampledModelOptions = DEFAULTS) -> None:
    """Talk to a model that moe-gpt finetune made, or to a Hugging Face folder with a chat template.

    In a conversation, /reset forgets everything, /image FILE shows a picture with the next question, and /quit or the
    end of the input ends. Ctrl-C ends an answer.

    Args:
        model: A run (its newest checkpoint), a checkpoint, or a folder: quantised, or Mixtral, Mistral or Llama.
    """
    from moe_gpt.api.chatting import make_dialogue
    from moe_gpt.inference.sampling import SamplingConfig

    loaded = load_as_told(model, sampled)
    pending = [show(loaded, image) for image in options.image]
    sampling = SamplingConfig(temperature=options.temperature, top_k=sampled.top_k, top_p=sampled.top_p)
    dialogue = make_dialogue(
        loaded, options.tools, options.max_new_tokens, sampling, sampled.seed, options.context or sampled.max_seq_len
    )
    warn_of_context(loaded, options.context)
    beginning: list[Message] = [] if options.system is None else [{"role": "system", "content": options.system}]
    if options.message is not None:
        _answer(dialogue, [*beginning, _question(options.message, pending)], options.experts)
        return
    _Conversation(loaded, dialogue, beginning, pending, options.experts).talk()


def _question(text: str, pictures: Sequence[Opened]) -> Message:
    from moe_gpt.post_training.eyes import pieces_of

    return {"role": "user", "content": pieces_of(text, pictures) if pictures else text}


@dataclasses.dataclass
class _Conversation:
    """What was said, and the pictures for the next question."""

    loaded: LanguageModel
    dialogue: Dialogue
    beginning: list[Message]
    pending: list[Opened]
    with_experts: bool
    messages: list[Message] = dataclasses.field(default_factory=list)

    def talk(self) -> None:
        """Answer what is typed until the end."""
        self.messages = list(self.beginning)
        for line in _lines():
            if line == "/quit":
                return
            try:
                self._take(line)
            except KeyboardInterrupt:
                print("interrupted; this question is forgotten", file=sys.stderr)
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)

    def _take(self, line: str) -> None:
        if line == "/reset":
            self.messages, self.pending = list(self.beginning), []
            print("forgotten", file=sys.stderr)
        elif line.startswith("/image "):
            path = re.sub(r"""^(["'])(.*)\1$""", r"\2", line.removeprefix("/image ").strip())  # as in a shell
            self.pending.append(show(self.loaded, os.path.expanduser(path)))
            print("it is shown with your next question", file=sys.stderr)
        elif line.startswith("/"):
            print(f"there are /reset, /image FILE and /quit, got {line}", file=sys.stderr)
        elif line:
            question = _question(line, self.pending)
            self.messages, self.pending = _answer(self.dialogue, [*self.messages, question], self.with_experts), []


def _lines() -> Iterator[str]:
    """Yield what is typed, without the ends of the lines."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("type a message and press return; /reset forgets, /image FILE shows, /quit ends", file=sys.stderr)
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _answer(dialogue: Dialogue, messages: list[Message], with_experts: bool) -> list[Message]:
    """Print an answer as it is made; return the messages that fitted, with its turns."""
    end = ""
    try:
        for piece in dialogue.reply(messages):
            if piece.notice:
                print(wrap(f"note: {piece.notice}"), file=sys.stderr)
            print(_shown(piece, with_experts), end="", flush=True)
            end = "\n"
    finally:
        print(end=end, flush=True)
    if messages[-1].get("tool_calls") and dialogue.tools:
        print("note: the model went on calling tools", file=sys.stderr)
    return messages


def _shown(piece: Piece, with_experts: bool) -> str:
    from moe_gpt.report.routed_text import show_controls

    text = "\n".join("\t".join(map(show_controls, line.split("\t"))) for line in piece.text.split("\n"))
    if piece.is_result:
        return f" -> {text}\n"
    return _coloured(text, piece.experts) if with_experts and piece.experts else text


def _coloured(text: str, experts: TokenExperts) -> str:
    layers = experts.indices()
    return f"\x1b[38;5;{_COLOURS[layers[-1][0] % len(_COLOURS)]}m{text}\x1b[0m" if layers and text else text


_COLOURS = (196, 46, 33, 226, 201, 51, 208, 129, 118, 39, 214, 171, 83, 203, 75, 190)
"""Of the terminal's 256, for experts; beyond 16 they repeat."""
