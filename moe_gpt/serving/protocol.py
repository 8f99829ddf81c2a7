"""The bodies of requests: OpenAI's fields, each with the values that this server obeys. Everything else is refused."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_gpt.errors import shown
from moe_gpt.inference.sampling import SamplingConfig

MOST_CHOICES = 128
_Stop = Annotated[str, Field(max_length=1000)]
_Finite = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Refused(Exception):
    """A request that gets an error in OpenAI's shape.

    Args:
        message: one sentence for the client's author.
        param: the field that is wrong, if it is one.
        status: HTTP's.
        kind: OpenAI's ``type``.
        code: OpenAI's ``code``.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"Retry-After": "1"} if status in (429, 503) else {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        """Leave out unknown fields that are null: clients send all that they know."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name in cls.model_fields}


class _StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _ResponseFormat(_Body):
    type: Literal["text"]


class Generation(_Body):
    """What completions and chats have in common. None of a field means its default, as if it were absent."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: _Finite | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    return_experts: bool | None = None
    """Of this server: each chunk has the experts of its tokens."""
    # obeyed only where they change nothing
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # accepted, because they change no answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    prompt_field: ClassVar[str]
    """Where the prompt stands."""
    default_limit: ClassVar[int | None]
    """Tokens of an answer that names no limit; None goes on until the context is full."""

    @property
    def limit_field(self) -> str:
        """The field that limits the answer."""
        return "max_tokens"

    @property
    def limit(self) -> int | None:
        """The limit that the body names."""
        limit: int | None = getattr(self, self.limit_field)
        return limit

    @property
    def sampling(self) -> SamplingConfig:
        """Temperature 1 where none is named, as OpenAI's."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingConfig(temperature=temperature, top_k=self.top_k or 0, top_p=self.top_p or 1.0)

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def n_choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _stream_options_belong_to_streams(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options needs stream: true", "stream_options")
        return self


class CompletionBody(Generation):
    """``POST /v1/completions``."""

    prompt_field = "prompt"
    default_limit = 16  # as OpenAI's

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One or several, as texts or as tokens."""
        is_one = isinstance(self.prompt, str) or all(isinstance(part, int) for part in self.prompt)
        return cast(Sequence[str | list[int]], [self.prompt] if is_one else self.prompt)

    @property
    def n_logprobs(self) -> int | None:
        """How many most likely tokens to report with each token; None reports no log-probabilities."""
        return self.logprobs

    @model_validator(mode="after")
    def _best_is_all(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n_choices:
            raise Refused(f"best_of must equal n, which is {self.n_choices}, got {self.best_of}", "best_of")
        return self


class _TextPart(_Body):
    type: Literal["text"]
    text: str


class _ImageUrl(_Body):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # pictures have one size here


class _ImagePart(_Body):
    type: Literal["image_url", "image"]
    image_url: _ImageUrl | str | None = None
    image: str | None = None


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]]

    @property
    def text(self) -> str:
        """The content without pictures; the texts of several parts follow each other."""
        parts = [self.content] if isinstance(self.content, str) else self.content
        return "".join(part if isinstance(part, str) else getattr(part, "text", "") for part in parts)

    @property
    def n_pictures(self) -> int:
        """Parts that are pictures."""
        return sum(isinstance(part, _ImagePart) for part in self.content)


class ChatBody(Generation):
    """``POST /v1/chat/completions``."""

    prompt_field = "messages"
    default_limit = None

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def limit_field(self) -> str:
        """That of the smaller of both limits."""
        given = {name: getattr(self, name) for name in ("max_tokens", "max_completion_tokens")}
        return min(("max_tokens", "max_completion_tokens"), key=lambda name: (given[name] is None, given[name] or 0))

    @property
    def n_logprobs(self) -> int | None:
        """As that of completions; 0 where no alternatives are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
        return self


AnyBody = CompletionBody | ChatBody
Body = TypeVar("Body", CompletionBody, ChatBody)


_MUST_BE = {
    "prompt": "a text, a list of texts, a list of tokens or a list of lists of tokens",
    "messages": "a list of {role, content}, where role is system, developer, user or assistant and content is a text, "
    "or a list of parts of type text and, for a model that sees, image_url or image",
    "stop": "a text or at most 16 texts, of at most 1,000 characters",
    "presence_penalty": "0 or absent, because penalties are not built",
    "frequency_penalty": "0 or absent, because penalties are not built",
    "logit_bias": "empty or absent, because it is not built",
    "suffix": "null or absent, because it is not built",
    "tools": "empty or absent, because the server runs no tools (moe-gpt chat does)",
    "tool_choice": "none, auto or absent, because the server runs no tools",
    "response_format": '{"type": "text"} or absent, because no other form is built',
    "modalities": '["text"] or absent, because nothing else is built',
}
"""What a field must be, where the checks of its parts would not say it."""


def parse(data: bytes, kind: type[Body]) -> Body:
    """Return the body of a request.

    Raises:
        Refused: where it is no JSON object, or a field is unknown, twice there, or has a value that is not obeyed.
    """
    try:
        text = data.decode("utf-8-sig")
        values = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once) if text.strip() else None
    except RecursionError:
        raise Refused("the body is nested too deeply") from None
    except ValueError as error:
        raise Refused(f"the body is not JSON in UTF-8: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise Refused(f"the body must be a JSON object, got {'nothing' if values is None else type(values).__name__}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, kind) from None


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise Refused(f"{twice!r} stands twice in an object", twice)
    return values


def _refusal(error: ValidationError, kind: type[Generation]) -> Refused:
    """Return the refusal for the first thing that is wrong."""
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return Refused(f"{name!r} is not a field of this server{_nearest(name, kind)}", name)
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return Refused(f"{name!r} is missing", name)
    place = ".".join(str(part) for part in first["loc"])
    reason = f"{name} must be {_MUST_BE[name]}" if name in _MUST_BE else f"{place}: {first['msg']}"
    return Refused(f"{reason}, got {shown(first['input'])}", name)


def _nearest(name: str, kind: type[Generation]) -> str:
    near = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0.8)
    return f"; did you mean {near[0]!r}?" if near else ""
