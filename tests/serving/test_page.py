"""The page at /: what it is made of, and what a browser does with it."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
import time
from collections.abc import Iterator

import httpx
import pytest
from serving.browser import CONTROL, ENTER, ESCAPE, MISSING, RIGHT, TAB, Browser, browse
from serving.served import make_model, make_service, make_tokenizer, serve
from serving.test_pictures import asking, part, png, seeing_service
from tiny_seeing import SIZE

from moe_gpt.config import ModelConfig
from moe_gpt.inference.engine import Engine
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.serving.live import Live
from moe_gpt.serving.server import PAGE

REPORT = PAGE.parents[1] / "report" / "report.html.jinja"
TEXT = PAGE.read_text(encoding="utf-8")
KEY = "right"
SETTINGS = {"model": "small", "max_tokens": 30, "temperature": 0.8, "top_p": 1, "seed": 7, "return_experts": True}
in_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")


def test_the_script_names_elements_that_exist():
    """Every ``ui.name`` of the script is an id of the page, each id is unique, and labels name ids."""
    ids = re.findall(r'\bid="(\w+)"', TEXT)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"\bui\.(\w+)", TEXT)) <= set(ids)
    assert set(re.findall(r'\b(?:for|aria-labelledby)="(\w+)"', TEXT)) <= set(ids)


def test_the_page_is_one_small_file():
    """No address leads outside, and no element loads another file."""
    assert set(re.findall(r"\w+://[^\s'\"]+", TEXT)) == {"http://www.w3.org/2000/svg"}  # a name, in the icon
    assert set(re.findall(r'\b(?:src|href)="(\w+:|)', TEXT)) == {"data:"}
    assert not re.search(r"@import|url\(|innerHTML|\bstyle=\"|\bon\w+=\"", TEXT)
    assert len(TEXT.splitlines()) <= 400


def test_experts_have_the_colours_of_reports():
    """A reader finds the expert of a report by the same colour."""
    report = re.search(r"for colour in \((.*?)\)", REPORT.read_text(encoding="utf-8"))
    page = re.search(r"COLOURS = \[(.*?)\]", TEXT, re.DOTALL)
    assert re.findall("#[0-9a-f]{6}", page[1]) == re.findall("#[0-9a-f]{6}", report[1])


@pytest.fixture(scope="module")
def service():
    """A service that chats, wants a key and has room for long answers, which nothing ends."""
    engine = Engine(make_model(make_tokenizer().vocab_size, context=4096), n_rows=4)
    service = make_service(live=Live(engine), api_key=KEY)
    service.ends = []
    return service


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    """Its address."""
    with serve(service) as address:
        yield address


def test_the_policy_allows_this_style_and_this_script_alone(url):
    """Whatever else came into the page would be neither run nor sent elsewhere."""
    answer = httpx.get(url)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    for tag in ("style", "script"):
        (inline,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert (policy["default-src"], policy["connect-src"], policy["img-src"]) == ("'none'", "'self'", "data:")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for all tests."""
    with browse() as browser:
        yield browser


@pytest.fixture
def page(chromium, url) -> Iterator[Browser]:
    """The page with the key and the settings of ``SETTINGS``; afterwards the console must be silent."""
    chromium.show_as(1280, 900, "light")
    load(chromium, url)
    fill(chromium, key=KEY, limit=30, seed=7)
    chromium.complaints()  # those of the page before
    yield chromium
    assert chromium.complaints() == []


def load(browser: Browser, url: str) -> None:
    """Open the page and wait until it knows the model."""
    browser.open(url)
    browser.wait("document.title === 'moe_gpt: small'")


def fill(browser: Browser, **values: object) -> None:
    """Write into fields."""
    for name, value in values.items():
        browser.run("ui[arguments[0]].value = arguments[1]", name, str(value))


def send(browser: Browser, prompt: str) -> str:
    """Send a prompt by keyboard, and return the summary of the answer."""
    fill(browser, prompt=prompt)
    browser.run("ui.prompt.focus()")
    browser.press(CONTROL, ENTER)
    return browser.wait("!ui.send.hidden && ui.summary.textContent")


def choose(browser: Browser, name: str, value: object) -> None:
    """Choose a value as a user does."""
    fill(browser, **{name: value})
    browser.run("ui[arguments[0]].dispatchEvent(new Event('change', {bubbles: true}))", name)


def ask(url: str, path: str, **body: object) -> dict:
    """Return the choice that the server itself gives."""
    answer = httpx.post(url + path, json=SETTINGS | body, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
    return answer.json()["choices"][0]


TOKENS = "[...document.querySelectorAll('.token')]"


@pytest.mark.slow
@in_browser
def test_a_token_has_the_colour_of_its_first_expert(page, url):
    """The text is the server's for the seed, and the colours are those of the experts that the server tells."""
    assert "30 tokens" in send(page, "the quick")
    choice = ask(url, "/v1/completions", prompt="the quick")
    assert page.run("return ui.answer.textContent") == "the quick" + choice["text"]
    to_colours = "return arguments[0].map(expert => make('i', {style: painted(expert)}).style.backgroundColor)"
    firsts = [page.run(to_colours, [token["experts"][layer][0] for token in choice["experts"]]) for layer in (0, 1)]
    for layer, expected in enumerate(firsts):
        choose(page, "layer", layer)
        assert page.run(f"return {TOKENS}.map(token => token.style.backgroundColor)") == expected
        assert len(set(expected)) > 3
    choose(page, "layer", "all")
    stripes = page.run(f"return {TOKENS}.map(token => token.style.backgroundImage.match(/rgb.*?\\)/g))")
    assert [tuple(stripe[::2]) for stripe in stripes] == list(zip(*firsts, strict=True))  # each names its two ends


@pytest.mark.slow
@in_browser
def test_the_keyboard_opens_a_tokens_details(page, url):
    """From the choice of the layer, Tab goes to the first token and an arrow to the next, with its experts below."""
    send(page, "the quick")
    page.run("ui.layer.focus()")
    page.press(TAB)
    page.press(RIGHT)
    assert page.run(f"return {TOKENS}.indexOf(document.activeElement)") == 1
    token = ask(url, "/v1/completions", prompt="the quick")["experts"][1]
    pairs = [zip(*layer, strict=True) for layer in zip(token["experts"], token["weights"], strict=True)]
    shares = page.run("return [...ui.details.querySelectorAll('.share')].map(share => share.textContent)")
    assert shares == [f"{expert}: {int(100 * weight + 0.5)} %" for layer in pairs for expert, weight in layer]
    label = page.run("return document.activeElement.ariaLabel")
    assert label.endswith(f": expert {token['experts'][1][0]} of layer 1")


@pytest.mark.slow
@in_browser
def test_escape_stops_an_answer(page, service):
    """The text stays, the server's row is free, and the focus is where the next answer is sent."""
    fill(page, limit=4000, prompt="def ")
    page.run("ui.send.focus()")
    page.press(ENTER)
    page.wait(f"{TOKENS}.length > 20")
    assert page.run("return document.activeElement.id") == "stop"
    page.press(ESCAPE)
    assert page.wait("!ui.send.hidden && ui.summary.textContent").endswith("You stopped it.")
    assert page.run("return document.activeElement.id") == "send"
    assert 20 < page.run(f"return {TOKENS}.length") < 4000
    deadline = time.monotonic() + 2
    while service.live.engine.n_running:
        assert time.monotonic() < deadline


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"key": "wrong"}, "The server refused the key."),
        ({"key": "\U0001f511"}, "The key has a character that HTTP cannot send."),
        ({"limit": 4095, "prompt": "the quick"}, "exceed the context of 4096 tokens. (HTTP 400)"),
    ],
)
def test_an_error_is_a_sentence(chromium, page, values, said):
    """It stands below the button, goes away with the next answer, and the text that was sent stays in its field."""
    fill(page, **{"prompt": "the"} | values)
    page.run("ui.form.requestSubmit()")
    assert said in page.wait("ui.error.textContent")
    assert (page.run("return ui.prompt.value"), page.run("return ui.answer.textContent")) == (
        values.get("prompt", "the"),
        "",
    )
    chromium.complaints()  # the console names the status of a failed request
    fill(page, key=KEY, limit=3)
    send(page, "the")
    assert page.run("return ui.error.textContent") == ""


@pytest.mark.slow
@in_browser
def test_a_chat_remembers_what_was_said(page, url):
    """The second answer is the server's to the whole conversation; a new conversation begins without it."""
    page.run("ui.chat.click()")
    turns = []
    for _ in range(2):
        send(page, "hello")
        turns.append({"role": "user", "content": "hello"})
        expected = ask(url, "/v1/chat/completions", messages=turns)["message"]
        turns.append(expected)
        assert page.run("return ui.answer.lastChild.lastChild.textContent") == expected["content"]
    assert page.run("return ui.answer.children.length") == 2
    page.run("ui.fresh.click()")
    send(page, "hello")
    assert page.run("return ui.answer.textContent") == f"YouhelloModel{turns[1]['content']}"


@pytest.mark.slow
@in_browser
def test_a_chat_shows_pictures_to_a_model_that_sees(chromium):
    """The answer is the server's to the same picture, later turns keep it, and the page shows it."""
    data = png(1)
    put = """
        const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0)), given = new DataTransfer();
        given.items.add(new File([bytes], "a.png", {type: "image/png"}));
        ui.files.files = given.files;
    """
    with serve(seeing_service()) as url:
        load(chromium, url)
        fill(chromium, limit=5, seed=7)
        assert not chromium.run("return ui.files.checkVisibility()")
        chromium.run("ui.chat.click()")
        chromium.run(put, base64.b64encode(data).decode())
        turns = asking(part(data), "hello")
        for said in ("hello", "again"):
            send(chromium, said)
            settings = SETTINGS | {"max_tokens": 5, "messages": turns}
            expected = httpx.post(f"{url}/v1/chat/completions", json=settings).json()["choices"][0]["message"]
            assert chromium.run("return ui.answer.lastChild.lastChild.textContent") == expected["content"]
            turns += [expected, {"role": "user", "content": "again"}]
        assert chromium.run("return [...document.images].map(image => image.naturalWidth)") == [SIZE]
        assert chromium.run("return ui.files.value") == ""
        assert chromium.complaints() == []


@pytest.mark.slow
@in_browser
def test_text_is_never_read_as_html(page):
    """Tags are shown, control characters have a sign, and a copy of the answer has the text itself."""
    prompt = "<img src=x onerror=alert(1)>\x1b[1m\u202eabc\n\t"
    send(page, prompt)
    assert page.run("return document.querySelector('.given').textContent") == prompt
    signs = page.run("return [...document.querySelectorAll('.given .control')].map(sign => sign.style.cssText)")
    assert [re.search('"(.*)"', sign)[1] for sign in signs] == ["␛", "U+202E", "↵", "⇥"]
    assert page.run("return document.images.length") == 0


@pytest.mark.slow
@in_browser
def test_the_load_is_that_of_the_work_since_the_page_was_opened(page, service):
    """Bars count assignments of all clients, a cell says its number, and a hidden page asks nothing."""
    before = service.live.engine.load.counts()
    send(page, "the quick brown fox")
    page.wait("sum(passed.flat(2)) > 0 && ui.speed.textContent === '0'")
    counts = (service.live.engine.load.counts() - before).flatten().tolist()
    labels = page.run("return [...ui.load.querySelectorAll('td')].map(cell => cell.ariaLabel)")
    assert [int(re.search(r": (\d+) tokens", label)[1]) for label in labels] == counts
    page.run("ui.load.querySelector('td').focus()")
    page.press(RIGHT)
    assert page.run("return ui.cell.textContent").startswith("Layer 0, expert 1: ")
    page.run("Object.defineProperty(document, 'hidden', {value: true})")
    time.sleep(1)
    polls = "return performance.getEntriesByType('resource').filter(entry => entry.name.endsWith('/live')).length"
    n_polls = page.run(polls)
    time.sleep(1.5)
    assert page.run(polls) == n_polls > 1


@pytest.mark.slow
@in_browser
def test_a_dense_model_has_no_colours(chromium):
    """The page says why, and answers all the same."""
    shape = {"n_layers": 1, "d_model": 32, "n_heads": 4, "head_dim": 16, "d_ff": 32, "n_experts": 1, "top_k": 1}
    model = MoEGPT(ModelConfig(vocab_size=make_tokenizer().vocab_size, max_seq_len=64, **shape))
    with serve(make_service(live=Live(Engine(model)))) as url:
        load(chromium, url)
        fill(chromium, limit=5, seed=7)
        assert "5 tokens" in send(chromium, "the")
    assert chromium.run("return ui.legend.textContent").startswith("This model is dense")
    shown = "return ['picture', 'layers', 'details', 'reads', 'locked'].filter(id => ui[id].checkVisibility())"
    assert chromium.run(shown) == []
    assert chromium.run("return document.querySelectorAll('.token').length") == 0
    assert chromium.wait("ui.heading.textContent === 'The server does not answer'")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (360, 800)])
def test_the_page_fits_the_screen(page, tmp_path, width, height, scheme):
    """Nothing is wider than a desktop or a phone, and the picture has as many pixels as the screen."""
    page.show_as(width, height, scheme)
    send(page, "def f(x):\n    return " + "x" * 200)
    page.run(f"{TOKENS}[8].focus()")
    assert page.run("return document.documentElement.scrollWidth") == width
    wide = (
        "return [...document.body.querySelectorAll('*')].filter(box => box.getBoundingClientRect().right > innerWidth)"
    )
    assert page.run(f"{wide}.map(box => box.outerHTML)") == []
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]
    picture = tmp_path / f"page-{width}-{scheme}.png"
    page.photograph(picture)
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (width, height)
