"""A small model behind a real socket, for tests of the server."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn

from moe_gpt.config import ModelConfig
from moe_gpt.data.tokenizer import Tokenizer, train_tokenizer
from moe_gpt.inference.engine import Engine
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.serving.chat import ChatTemplate
from moe_gpt.serving.jobs import Service
from moe_gpt.serving.live import Live
from moe_gpt.serving.server import make_app

TEXTS = ["the quick brown fox jumps over the lazy dog. ", "def f(x): return x + 1\n", "größer schöner 東京 \U0001f600 "]
TEMPLATE = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant: {% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer of 300 tokens."""
    return train_tokenizer(TEXTS * 20, 300)


def make_model(vocab_size: int, context: int = 256) -> MoEGPT:
    """Return an untrained model that varies its answers."""
    torch.manual_seed(0)
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "head_dim": 16, "d_ff": 32, "n_experts": 8}
    return MoEGPT(ModelConfig(vocab_size=vocab_size, max_seq_len=context, init_std=0.15, **shape)).eval()


def make_service(engine: dict[str, Any] | None = None, **changes: Any) -> Service:
    """Return a service that is called "small" and can chat."""
    tokenizer = make_tokenizer()
    live = Live(Engine(make_model(tokenizer.vocab_size), **(engine or {})))
    service = Service(live, tokenizer, tokenizer.encode, "small", ChatTemplate(TEMPLATE, tokenizer))
    return dataclasses.replace(service, **changes)


@contextlib.contextmanager
def serve(service: Service) -> Iterator[str]:
    """Serve in a thread until the end of the block; yield the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
