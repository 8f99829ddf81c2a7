"""``moe-gpt serve``: answer requests over HTTP."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from moe_gpt.commands.generate import load_as_told, warn_of_context
from moe_gpt.commands.options import AboveZero, Device, Precision, Quantize, Switch, Whole, WholeOrZero, flat
from moe_gpt.commands.speculation import NO_SPECULATION, SpeculationOptions, make_draft
from moe_gpt.errors import InputError
from moe_gpt.terminal.numbers import format_value

if TYPE_CHECKING:
    from moe_gpt.api.loaded import LanguageModel
    from moe_gpt.inference.speculation import Draft
    from moe_gpt.serving.jobs import Service

PLACE, CLIENTS, ENGINE = (Group.create_ordered(name) for name in ("Address", "Limits for clients", "Engine"))


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Address, limits and engine."""

    host: Annotated[str, Parameter(group=PLACE)] = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: Annotated[WholeOrZero, Parameter(group=PLACE)] = 8000
    """Port to listen at; 0 takes a free one."""
    api_key: Annotated[str | None, Parameter(group=PLACE, env_var="MOE_GPT_API_KEY")] = None
    """Key that clients must send as a bearer token; without one, everybody who reaches the port is served."""
    name: Annotated[str | None, Parameter(group=PLACE)] = None
    """The model's name for clients; by default the folder's name."""
    max_waiting: Annotated[WholeOrZero, Parameter(group=CLIENTS)] = 256
    """Requests that may wait for a row; more get 429."""
    max_bytes: Annotated[Whole | None, Parameter(group=CLIENTS)] = None
    """Bytes of a request at most; more get 413. By default 1 MiB, for a model that sees 8 MiB."""
    max_seconds: Annotated[AboveZero, Parameter(group=CLIENTS)] = 600.0
    """Seconds for an answer at most; slower ones get 504, or an error event in a stream."""
    stop_seconds: Annotated[Whole, Parameter(group=CLIENTS)] = 30
    """Seconds that running answers get after SIGTERM or Ctrl-C; a second signal ends at once."""
    rows: Annotated[Whole, Parameter(group=ENGINE)] = 32
    """Requests that run at once, each in a row of the cache."""
    context: Annotated[Whole | None, Parameter(group=ENGINE)] = None
    """Positions of prompt and answer together; by default the longest sequence that the run was trained on."""
    no_prompt_reuse: Annotated[Switch, Parameter(group=ENGINE)] = False
    """Compute every prompt anew, even where it begins like an earlier one."""
    threads: Annotated[Whole, Parameter(group=ENGINE)] = 1
    """Threads for matrix products. With one, what a request gets does not depend on other requests, bit for bit."""
    max_seq_len: Annotated[Whole | None, Parameter(group=ENGINE)] = None
    """Context in tokens to use instead of the model's own."""
    router: Annotated[str | None, Parameter(group=ENGINE)] = None
    """Your own router, as FILE.py:NAME, if the model was trained with one."""
    precision: Annotated[Precision | None, Parameter(group=ENGINE)] = None
    """Compute type; fp32 on a CPU, else auto, by default."""
    quantize: Annotated[Quantize | None, Parameter(group=ENGINE)] = None
    """Weights in fewer bits: int8, int4 (docs/quantised.md)."""
    device: Annotated[Device, Parameter(group=ENGINE)] = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


def serve(
    model: str, *, options: ServeOptions = ServeOptions(), speculation: SpeculationOptions = NO_SPECULATION
) -> None:
    """Answer requests in OpenAI's form over HTTP, many at once, and show a page for browsers.

    Args:
        model: A run (its newest checkpoint), a checkpoint, or a folder: quantised, or Mixtral, Mistral or Llama.
    """
    try:
        from moe_gpt.serving.process import check_key, listen, run
    except ImportError as error:
        raise InputError(f"serve needs {error.name}, which is not installed: pip install 'moe_gpt[serve]'") from None
    if options.name == "":
        raise InputError("--name must not be empty")
    check_key(options.api_key, options.host)
    with listen(options.host, options.port) as listener:
        loaded = load_as_told(model, options)
        warn_of_context(loaded, options.context or options.max_seq_len)
        draft = make_draft(speculation, loaded, options.rows)
        service = _service(loaded, model, options, draft)
        _announce(service, options, listener.getsockname()[1], speculation)
        run(service, listener, options.stop_seconds)


def _announce(service: Service, options: ServeOptions, port: int, speculation: SpeculationOptions) -> None:
    host, engine = f"[{options.host}]" if ":" in options.host else options.host, service.live.engine
    details = f"{engine.n_rows} rows of {engine.context} tokens, {format_value(engine.cache_bytes, 'bytes')} of cache"
    details += ", with a key" * (service.api_key is not None) + speculation.describe()
    print(f"serving {service.name} at http://{host}:{port} ({details})", file=sys.stderr, flush=True)


def _service(loaded: LanguageModel, model: str, options: ServeOptions, draft: Draft | None) -> Service:
    from moe_gpt.api.chatting import find_template
    from moe_gpt.inference.engine import Engine
    from moe_gpt.inference.generate import checked_context
    from moe_gpt.serving.jobs import Service
    from moe_gpt.serving.live import Live
    from moe_gpt.serving.process import LOOPBACK
    from moe_gpt.vision.seeing import SeeingModel

    tokenizer, sees = loaded.require_tokenizer(), isinstance(loaded.model, SeeingModel)
    context = options.context or options.max_seq_len or loaded.context
    try:
        engine = Engine(
            loaded.model,
            n_rows=options.rows,
            context=checked_context(loaded.model, context),
            max_waiting=options.max_waiting,
            reuse_prompts=not options.no_prompt_reuse,
            draft=draft,
            precision=loaded.precision,
        )
    except RuntimeError as error:  # of the allocator
        text = f"--rows {options.rows}: no memory for a cache of {options.rows} x {context} tokens"
        raise InputError(f"{text}: {str(error)[:200]}") from None
    return Service(
        live=Live(engine, options.threads),
        tokenizer=tokenizer,
        encode=lambda text: [*loaded.text_start, *tokenizer.encode(text)],  # warns of nothing: no text is logged
        name=options.name or Path(model).resolve().name,
        template=find_template(loaded, Path(model)),
        hosts=LOOPBACK if options.host in LOOPBACK else None,
        api_key=options.api_key,
        eyes=loaded.eyes if sees else None,
        max_bytes=options.max_bytes or (8 << 20 if sees else 1 << 20),
        max_seconds=options.max_seconds,
    )
