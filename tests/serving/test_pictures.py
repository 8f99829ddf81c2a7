"""Pictures over a real socket: OpenAI's parts, what is refused, and requests that share passes."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image
from serving.served import make_model, make_service, serve
from serving.test_server import lines, post
from tiny_seeing import SIZE, give_eyes

from moe_gpt.api.loaded import LanguageModel
from moe_gpt.inference.engine import Engine
from moe_gpt.post_training.chat import SPECIAL_TOKENS, TEMPLATE
from moe_gpt.serving.chat import ChatTemplate
from moe_gpt.serving.jobs import Service
from moe_gpt.serving.live import Live

CHAT = "/v1/chat/completions"


def seeing_service(can_chat: bool = True, **changes: object) -> Service:
    """A service whose model sees, with marks of turns or without."""
    blind = make_service()
    tokenizer = blind.tokenizer.with_special_tokens(SPECIAL_TOKENS) if can_chat else blind.tokenizer
    model = give_eyes(make_model(tokenizer.vocab_size))
    loaded = LanguageModel(model, tokenizer, Path("small"))
    template = ChatTemplate(TEMPLATE, tokenizer) if can_chat else None
    live = Live(Engine(model, n_rows=8))
    service = Service(live, tokenizer, tokenizer.encode, "small", template, loaded.eyes)
    return dataclasses.replace(service, **changes)


@pytest.fixture(scope="module")
def service() -> Service:
    """It sees and chats."""
    return seeing_service()


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    """Its address."""
    with serve(service) as address:
        yield address


def png(number: int) -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), tuple(number * k % 256 for k in (40, 100, 170))).save(file, "PNG")
    return file.getvalue()


def part(content: bytes, kind: str = "image/png", **more: str) -> dict:
    """A picture as OpenAI's clients send it."""
    return {
        "type": "image_url",
        "image_url": {"url": f"data:{kind};base64,{base64.b64encode(content).decode()}"} | more,
    }


def asking(*parts: dict | str) -> list[dict]:
    """A question with pictures."""
    texts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]
    return [{"role": "user", "content": texts}]


@pytest.mark.parametrize("can_chat", [True, False], ids=["chat", "base"])
def test_an_answer_is_that_of_python(can_chat, service, url):
    """Through the real client, whole and as a stream; another picture is another answer; ``detail`` changes nothing."""
    served = service if can_chat else seeing_service(can_chat=False)
    loaded = LanguageModel(served.eyes.model, served.tokenizer, Path("small"))
    messages, kept = asking(part(png(1), detail="high"), "what is it?"), {"temperature": 0, "max_tokens": 16}
    with contextlib.nullcontext(url) if can_chat else serve(served) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        whole = client.chat.completions.create(model="small", messages=messages, **kept).choices[0].message.content
        chunks = lines(address, CHAT, {"model": "small", "messages": messages} | kept)
        other = post(address, CHAT, messages=asking(part(png(2)), "what is it?"), **kept).json()
        url = messages[0]["content"][0]["image_url"]["url"]
        forms = [{"type": "image_url", "image_url": url}, {"type": "image", "image": url}]
        same = [post(address, CHAT, messages=asking(form, "what is it?"), **kept).json() for form in forms]
        blind = post(address, CHAT, messages=asking("what is it?"), **kept).json()
    expected = loaded.chat(messages, max_new_tokens=16)
    assert [each["choices"][0]["message"]["content"] for each in same] == [whole, whole]
    assert whole.strip() == expected.strip()
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole
    assert len({whole, *(each["choices"][0]["message"]["content"] for each in (other, blind))}) == 3


def test_many_clients_get_their_own_pictures(url):
    """At once, with equal prompts, what each gets alone, log-probabilities included."""
    scored = {"n": 2, "logprobs": True, "top_logprobs": 3}
    bodies = [
        {"messages": asking(*[part(png(k)) for k in seeds], "look"), "seed": 3, "max_tokens": 10} | scored
        for seeds in ([], [1], [2], [1, 2], [2, 1], [1], [])
    ]

    def ask(body: dict) -> str:
        return str(post(url, CHAT, **body).json()["choices"])

    alone = [ask(body) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        assert list(pool.map(ask, bodies)) == alone
    assert len(set(alone)) == 5


def test_text_alone_gets_what_a_text_model_gives(url, service):
    """Log-probabilities to the last digit."""
    tokenizer = service.tokenizer
    text = Service(
        Live(Engine(make_model(tokenizer.vocab_size))),
        tokenizer,
        tokenizer.encode,
        "small",
        service.template,
    )
    body = {"messages": asking("hello <image>"), "max_tokens": 12, "logprobs": True, "top_logprobs": 2, "seed": 1}
    with serve(text) as plain:
        right = post(plain, CHAT, **body).json()["choices"]
        refused = post(plain, CHAT, messages=asking(part(png(1)), "x"))
    assert post(url, CHAT, **body).json()["choices"] == right
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "small sees no pictures; send parts of type text alone"


def bomb(side: int) -> bytes:
    """A PNG whose header claims many pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}],
            "no address is fetched and no file is read",
        ),
        ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], "got '/etc/passwd'"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "no file is read"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}], "must be data:image/TYPE;base64"),
        ([{"type": "image_url", "image_url": {"url": "data:,x"}}], "must be data:image/TYPE;base64"),
        (
            [{"type": "image_url", "image_url": "data:image/png;base64,aaaa"}],
            "content.0.image_url: the picture must be",
        ),
        ([{"type": "image", "image": "/etc/passwd"}], "content.0.image: it must be data:image/TYPE;base64, and base64"),
        ([{"type": "image"}], "messages.0.content.0.image must be a picture, got none"),
        ([{"type": "image_url", "image_url": {"url": "x", "size": 3}}], "messages must be a list"),
        ([{"type": "input_audio"}], "messages must be a list"),
        ([part(b"hello")], "messages.0.content.0.image_url.url: the picture must be PNG, JPEG"),
        ([part(png(1)[:60])], "cannot be read as a picture"),
        (
            ["look", part(bomb(5_000))],
            "messages.0.content.1.image_url.url: the picture: it has 5,000 x 5,000 pixels; at",
        ),
        ([part(png(1))] * 9, "at most 8 pictures, got 9"),
    ],
)
def test_what_is_no_picture_is_400_with_its_cause(url, parts, message):
    """In OpenAI's shape, naming the field; the server goes on."""
    answer = post(url, CHAT, messages=asking(*parts), max_tokens=2)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert message in error["message"]
    assert len(error["message"]) < 600


def test_only_users_show_pictures(url):
    """And a body beyond its limit is 413, whatever is in it."""
    answer = post(url, CHAT, messages=[{"role": "system", "content": [part(png(1))]}, *asking("x")])
    assert answer.status_code == 400
    assert "only a user's message may have pictures" in answer.json()["error"]["message"]
    long = httpx.post(url + CHAT, content=b'{"a":"' + b"x" * (1 << 20) + b'"}', timeout=30)
    assert long.status_code == 413
    assert long.json()["error"]["message"].endswith("bytes (moe-gpt serve --max-bytes)")


def test_a_model_without_turns_chats_on_the_page(url):
    """Where it sees: questions and answers as in training."""
    assert httpx.get(f"{url}/live").json()["chats"]
    with serve(seeing_service(can_chat=False)) as address:
        assert httpx.get(f"{address}/live").json()["chats"]
