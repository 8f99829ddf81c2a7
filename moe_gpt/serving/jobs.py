"""From a body to what the engine is asked."""

from __future__ import annotations

import dataclasses
import functools
import secrets
import time
from collections.abc import Callable, Sequence

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError, shown
from moe_gpt.inference.request import Request
from moe_gpt.inference.text import TextStream
from moe_gpt.post_training.eyes import Eyes, Looked, Opened, Source
from moe_gpt.serving.chat import ChatTemplate
from moe_gpt.serving.live import Live
from moe_gpt.serving.protocol import AnyBody, ChatBody, CompletionBody, Refused, parse
from moe_gpt.serving.replies import Replies
from moe_gpt.vision.pictures import is_data_url, read_data_url


@dataclasses.dataclass
class Service:
    """What the server serves, and its limits."""

    live: Live
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    """Turns a prompt into tokens."""
    name: str
    """The model's name for clients; any other name is 404."""
    template: ChatTemplate | None = None
    """How a chat is written; None answers chats with 400, unless the model sees."""
    eyes: Eyes | None = None
    """Of a model that sees; None refuses pictures."""
    max_pictures: int = 8
    """Pictures of a request at most."""
    max_pixels: int = 20_000_000
    """Pixels of a picture at most."""
    api_key: str | None = None
    """Clients must send it as a bearer token; None asks for none."""
    max_bytes: int = 1 << 20
    """Bytes of a body at most."""
    max_seconds: float = 600
    """Seconds for an answer at most."""
    hosts: frozenset[str] | None = None
    """Names by which requests may address the server; None allows all."""
    is_stopping: bool = False
    """Whether new requests are refused."""

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of a text that one token stands for at most, with room for what a tokenizer may drop."""
        return 4 * int(self.tokenizer.token_bytes().max())

    @functools.cached_property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        if self.template is None and self.eyes is not None:
            return self.eyes.ends
        turn = self.template.end_of_turn() if self.template else None
        return [token for token in (self.tokenizer.end_of_text_id, turn) if token is not None]


@dataclasses.dataclass
class Job:
    """A parsed request: what the engine is asked, and how the answer looks."""

    body: AnyBody
    requests: list[Request]
    replies: Replies
    n_prompt: int
    """Tokens of all prompts, each counted once."""
    echoed: list[str]
    """What each choice begins with."""
    began: float = dataclasses.field(default_factory=time.monotonic)


def completion_job(service: Service, data: bytes) -> Job:
    """Return what to do for ``/v1/completions``: n choices of the first prompt, then of the next.

    Raises:
        Refused: where the body is wrong, or model, prompt or limits are not this server's.
    """
    body = parse(data, CompletionBody)
    if body.max_tokens == 0 and not body.echo:
        raise Refused("max_tokens must be at least 1 unless echo is true, got 0", "max_tokens")
    return _job(service, body, [Looked(ids) for ids in _tokens(service, body)], echoes=bool(body.echo))


def _tokens(service: Service, body: CompletionBody) -> list[list[int]]:
    _refuse_long(service, body, [prompt for prompt in body.prompts if isinstance(prompt, str)])
    try:
        return [service.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    except InputError:  # of half a character; the message would quote the text
        raise Refused("prompt must be text that UTF-8 can write, got half of a surrogate pair", "prompt") from None


def chat_job(service: Service, data: bytes) -> Job:
    """Return what to do for ``/v1/chat/completions``.

    Raises:
        Refused: where the body is wrong, the model cannot chat, or model, messages or limits are not this server's.
    """
    body = parse(data, ChatBody)
    n_pictures = sum(message.n_pictures for message in body.messages)
    _check_pictures(service, n_pictures)
    if service.template is None and service.eyes is None:
        text = f"{service.name} has no chat template, so it only continues text: use /v1/completions"
        raise Refused(text, "messages")
    if body.max_tokens == 0:
        raise Refused("max_tokens must be at least 1, got 0", "max_tokens")
    _refuse_long(service, body, ["".join(message.text for message in body.messages)])
    try:
        prompt = _look(service, body) if n_pictures or service.template is None else _read(service.template, body)
    except InputError as error:
        raise Refused(str(error), "messages") from None
    return _job(service, body, [prompt], echoes=False)


def _check_pictures(service: Service, n_pictures: int) -> None:
    if n_pictures and service.eyes is None:
        raise Refused(f"{service.name} sees no pictures; send parts of type text alone", "messages")
    if n_pictures > service.max_pictures:
        text = f"a request may have at most {service.max_pictures} pictures, got {n_pictures}"
        raise Refused(text, "messages")


def _read(template: ChatTemplate, body: ChatBody) -> Looked:
    return Looked(template.encode([(message.role, message.text) for message in body.messages]))


def _look(service: Service, body: ChatBody) -> Looked:
    """Return the tokens of a conversation with its pictures, which are decoded and encoded here."""
    assert service.eyes is not None
    eyes, given = service.eyes, [message.model_dump() for message in body.messages]
    for message in given:
        message["role"] = "system" if message["role"] == "developer" else message["role"]

    def open_one(url: Source) -> Opened:
        if not is_data_url(str(url)):
            text = "it must be data:image/TYPE;base64, and base64 after it; no address is fetched and no file is read"
            raise InputError(f"{text}, got {shown(str(url)[:60])}")
        return eyes.open(read_data_url(str(url)), service.max_pixels)

    text = eyes.spell_conversation(eyes.take_pictures(given, open_one))
    return Looked(text.ids, eyes.shown(text))


def _refuse_long(service: Service, body: AnyBody, texts: Sequence[str]) -> None:
    """Refuse a text that is certainly too long before it costs memory: tokens of a megabyte take a hundred."""
    context, longest = service.live.engine.context, max(map(len, texts), default=0)
    if longest > context * service.longest_token:
        field = body.prompt_field
        raise Refused(
            f"{field} must be shorter than the context of {context} tokens, got {longest:,} characters", field
        )


def _job(service: Service, body: AnyBody, prompts: Sequence[Looked], echoes: bool) -> Job:
    _check(service, body, [prompt.ids for prompt in prompts])
    seed = secrets.randbits(63) if body.seed is None else body.seed
    requests = [
        _request(service, body, prompt, (seed + choice) % 2**64, echoes)
        for prompt in prompts
        for choice in range(body.n_choices)
    ]
    try:
        for request in requests:
            service.live.engine.check(request)
    except InputError as error:
        raise Refused(str(error), body.prompt_field) from None
    echoed = [service.tokenizer.decode(request.prompt) if echoes else "" for request in requests]
    replies = Replies(body, service.name, service.tokenizer)
    return Job(body, requests, replies, sum(len(prompt.ids) for prompt in prompts), echoed)


def _request(service: Service, body: AnyBody, prompt: Looked, seed: int, echoes: bool) -> Request:
    return Request(
        prompt=prompt.ids,
        max_new_tokens=_limit(service, body, len(prompt.ids)),
        sampling=body.sampling,
        seed=seed,
        ends=service.ends,
        text=TextStream(service.tokenizer, prompt.ids, body.stops),
        n_logprobs=body.n_logprobs,
        scores_prompt=echoes and body.n_logprobs is not None,
        beside=prompt.beside,
    )


def _check(service: Service, body: AnyBody, prompts: Sequence[list[int]]) -> None:
    check_model(service, body.model)
    if not prompts or not all(prompts):
        raise Refused(f"{body.prompt_field} must have at least one token, got none", body.prompt_field)
    n_requests, most = len(prompts) * body.n_choices, service.live.engine.most_requests
    if n_requests > most:
        text = f"prompts times n must be at most {most}, got {len(prompts)} x {body.n_choices}"
        raise Refused(text, "n" if len(prompts) == 1 else body.prompt_field)


def check_model(service: Service, name: str) -> None:
    """Refuse another model's name."""
    if name != service.name:
        text = f"the model {name!r} is not served; this server has {service.name!r}"
        raise Refused(text, "model", 404, code="model_not_found")


def _limit(service: Service, body: AnyBody, n_prompt: int) -> int:
    """Return how many tokens to make."""
    context, limit, field = service.live.engine.context, body.limit, body.prompt_field
    room = context - n_prompt
    if room < 1 and limit != 0:
        raise Refused(f"{field} must be shorter than the context of {context} tokens, got {n_prompt}", field)
    if limit is None:
        return room if body.default_limit is None else min(body.default_limit, room)
    if limit > room:
        text = f"{n_prompt} tokens of {field} and {body.limit_field}={limit} exceed the context of {context} tokens"
        raise Refused(text, body.limit_field, code="context_length_exceeded")
    return limit
