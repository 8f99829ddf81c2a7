"""The HTTP server: OpenAI's completions and chats over one engine, and the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from prometheus_client import generate_latest
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moe_gpt.inference.engine import Overloaded
from moe_gpt.inference.request import Event
from moe_gpt.serving.jobs import Job, Service, chat_job, check_model, completion_job
from moe_gpt.serving.live import Answer
from moe_gpt.serving.protocol import Refused
from moe_gpt.serving.replies import Choice

_log = logging.getLogger(__name__)
_LONG_BODY = 16_384
_BODY_SECONDS = 30
_HUNG_UP = 499  # nobody reads it
PAGE = Path(__file__).with_name("page.html")


def make_app(service: Service) -> FastAPI:
    """Return the application; ``moe-gpt serve`` runs it with uvicorn."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.live.start()
        yield
        service.live.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_found)
    app.add_exception_handler(Exception, _failed)
    routes: dict[str, Callable[[Service, HttpRequest], Awaitable[Response]]] = {
        "/v1/completions": functools.partial(_answer, completion_job),
        "/v1/chat/completions": functools.partial(_answer, chat_job),
        "/v1/models": _models,
        "/v1/models/{name:path}": _model,
        "/health": _health,
        "/metrics": _metrics,
        "/live": _state,
        "/": _page,
    }
    for path, handler in routes.items():
        method = "POST" if path.endswith("completions") else "GET"
        app.add_route(path, functools.partial(handler, service), methods=[method])
    return app


async def _refuse(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status, error.headers)


async def _not_found(request: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = f"there is no {request.method} {request.url.path} here"
    return await _refuse(request, Refused(message, status=status, kind="not_found_error"))


async def _failed(request: HttpRequest, error: Exception) -> Response:
    return await _refuse(
        request, Refused(f"the server failed: {type(error).__name__}", status=500, kind="server_error")
    )


def _check_origin(service: Service, request: HttpRequest) -> None:
    """Refuse what pages of other sites let a visitor's browser send, under a name of their own too (DNS rebinding)."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if service.hosts is not None and urlsplit(f"//{host}").hostname not in service.hosts:
        text = f"this server is addressed as {' or '.join(sorted(service.hosts))}, not as {host}"
        raise Refused(text, status=403, kind="permission_error")
    if origin is not None and urlsplit(origin).netloc != host:
        text = f"a page of {origin} may not use this server; only its own page at {host} may"
        raise Refused(text, status=403, kind="permission_error")


def _check_key(service: Service, request: HttpRequest) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode(), (service.api_key or "").encode())
    if service.api_key is not None and not (is_right and scheme.lower() == "bearer"):
        text = "send the server's key as 'Authorization: Bearer KEY'"
        raise Refused(text, status=401, kind="authentication_error", code="invalid_api_key")


async def _read(service: Service, request: HttpRequest) -> bytes:
    """Return the body, counted as it is read; what a header says of its length is believed where it is too much."""
    data, announced = bytearray(), request.headers.get("content-length", "")
    too_long = Refused(f"the body may have at most {service.max_bytes:,} bytes (moe-gpt serve --max-bytes)", status=413)
    if announced.isdecimal() and int(announced) > service.max_bytes:
        raise too_long
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > service.max_bytes:
                    raise too_long
    except TimeoutError:
        raise Refused(f"the body took more than {_BODY_SECONDS} seconds", status=408) from None
    return bytes(data)


async def _answer(make_job: Callable[[Service, bytes], Job], service: Service, http: HttpRequest) -> Response:
    _check_origin(service, http)
    _check_key(service, http)
    try:
        data = await _read(service, http)
    except ClientDisconnect:
        return Response(status_code=_HUNG_UP)
    job = await _prepare(make_job, service, data)
    if service.is_stopping or service.live.failure:
        reason = "the server is stopping" if service.is_stopping else "the engine has failed"
        raise Refused(reason, status=503, kind="server_error")
    try:
        events = service.live.answer(job.requests)
    except Overloaded as error:
        raise Refused(f"too many requests: {error}", status=429, kind="rate_limit_error") from None
    if job.body.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _Stream(events, _stream(service, job, events), media_type="text/event-stream", headers=headers)
    try:
        return await _whole(service, http, job, events)
    finally:
        events.close()


class _Stream(StreamingResponse):
    """A response that cancels its requests however it ends, also where it never begins."""

    def __init__(self, events: Answer, content: AsyncIterator[str], **settings: Any) -> None:
        super().__init__(content, **settings)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.close()


async def _prepare(make_job: Callable[[Service, bytes], Job], service: Service, data: bytes) -> Job:
    # what takes long is read beside the event loop, which others wait for; for short texts that would take longer
    try:
        if len(data) > _LONG_BODY or service.eyes is not None:  # a short body may hold many pixels
            return await asyncio.to_thread(make_job, service, data)
        return make_job(service, data)
    except Refused:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]  # without the message, which may quote the client
        _log.error("a request failed: %s in %s:%s", type(error).__name__, place.filename, place.lineno)
        raise Refused(f"the server failed: {type(error).__name__}", status=500, kind="server_error") from None


async def _whole(service: Service, http: HttpRequest, job: Job, events: Answer) -> Response:
    """Return the answer when all of it is there, unless the client has gone or the time is over."""
    answer, gone = asyncio.create_task(_collect(job, events)), asyncio.create_task(_hang_up(http))
    await asyncio.wait({answer, gone}, timeout=service.max_seconds, return_when=asyncio.FIRST_COMPLETED)
    has_gone = gone.done()
    gone.cancel()
    if answer.done():
        return JSONResponse(answer.result())
    answer.cancel()
    if has_gone:
        return Response(status_code=_HUNG_UP)
    raise _out_of_time(service)


def _out_of_time(service: Service) -> Refused:
    return Refused(f"the answer took more than {service.max_seconds:g} seconds", status=504, kind="timeout_error")


async def _hang_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _collect(job: Job, events: Answer) -> dict[str, Any]:
    choices = [Choice(text, bool(job.body.return_experts)) for text in job.echoed]
    async for index, event in events:
        _raise_failure(event)
        choices[index].grow(event)
    _note(job, choices)
    return job.replies.whole(choices, job.n_prompt)


def _raise_failure(event: Event) -> None:
    if event.finish == "error":
        raise Refused(f"the model failed: {event.error}", status=500, kind="server_error")


def _note(job: Job, choices: list[Choice]) -> None:
    """Log sizes and time; nothing that anybody wrote."""
    n_tokens, seconds = sum(choice.n_tokens for choice in choices), time.monotonic() - job.began
    _log.info("%d prompt tokens, %d new tokens, %.3f seconds", job.n_prompt, n_tokens, seconds)


async def _stream(service: Service, job: Job, events: Answer) -> AsyncIterator[str]:
    """Yield the lines of server-sent events."""
    try:
        async with asyncio.timeout(service.max_seconds):
            async for part in _parts(job, events):
                yield _line(part)
    except TimeoutError:
        yield _line(_out_of_time(service).body)
    except Refused as error:  # the status has been sent
        yield _line(error.body)
    yield "data: [DONE]\n\n"


def _line(part: dict[str, Any]) -> str:
    return f"data: {json.dumps(part)}\n\n"  # in ASCII: some clients take U+2028 and its like for the end of a line


def _openings(job: Job) -> Iterator[dict[str, Any]]:
    """Yield what comes before the first token: the role in a chat, the prompt where it is echoed."""
    for index, text in enumerate(job.echoed):
        if job.replies.is_chat:
            yield job.replies.opening(index)
        elif text:
            yield job.replies.chunk(index, Choice(text))


async def _parts(job: Job, events: Answer) -> AsyncIterator[dict[str, Any]]:
    for part in _openings(job):
        yield part
    choices = [Choice() for _ in job.requests]
    async for index, event in events:
        _raise_failure(event)
        grown = Choice(keeps_experts=bool(job.body.return_experts))
        grown.grow(event)
        choices[index].n_tokens += grown.n_tokens
        if grown.is_worth_sending(job.replies):
            yield job.replies.chunk(index, grown)
    if job.body.reports_usage:
        yield job.replies.last(choices, job.n_prompt)
    _note(job, choices)


async def _models(service: Service, request: HttpRequest) -> Response:
    _check_key(service, request)
    return JSONResponse({"object": "list", "data": [_description(service)]})


async def _model(service: Service, request: HttpRequest) -> Response:
    _check_key(service, request)
    check_model(service, request.path_params["name"])
    return JSONResponse(_description(service))


def _description(service: Service) -> dict[str, Any]:
    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "moe_gpt"}
    return model | {"max_model_len": service.live.engine.context}


async def _health(service: Service, request: HttpRequest) -> Response:
    if service.live.failure:
        return PlainTextResponse(f"the engine failed: {service.live.failure}\n", 503)
    return PlainTextResponse("stopping\n" if service.is_stopping else "ok\n", 503 if service.is_stopping else 200)


async def _metrics(service: Service, request: HttpRequest) -> Response:
    return PlainTextResponse(generate_latest(service.live.metrics.registry))


async def _state(service: Service, request: HttpRequest) -> Response:
    """Return what the page shows of the whole server."""
    engine, metrics = service.live.engine, service.live.metrics
    return JSONResponse(
        {
            "running": engine.n_running,
            "waiting": engine.n_waiting,
            "rows": engine.n_rows,
            "tokens": metrics.n_tokens,
            "seconds": time.monotonic(),
            "touched": engine.load.touched(),
            "load": engine.load.counts().tolist(),
            "context": engine.context,
            "model": service.name,
            "chats": service.template is not None or service.eyes is not None,
            "sees": service.eyes is not None,
            "needs_key": service.api_key is not None,
        }
    )


async def _page(service: Service, request: HttpRequest) -> Response:
    page = PAGE.read_text(encoding="utf-8")
    return HTMLResponse(page, headers={"Content-Security-Policy": _policy(page), "Cache-Control": "no-cache"})


def _policy(page: str) -> str:
    """Return what a browser lets the page do: run its own style and script as they are here, and ask this server."""
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    policy += "; frame-ancestors 'none'; require-trusted-types-for 'script'"  # and no text becomes HTML
    for tag in ("style", "script"):
        inline = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inline).digest()).decode()}'"
    return policy
