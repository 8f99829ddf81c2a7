"""Pictures in use: prompts, conversations and commands, spelled as in training."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_seeing import SIZE, give_eyes, noise, tiny_text_model

from moe_gpt.api.chatting import make_dialogue
from moe_gpt.api.loaded import LanguageModel
from moe_gpt.data.tokenizer import Tokenizer, train_tokenizer
from moe_gpt.errors import InputError
from moe_gpt.inference.quantised import quantise
from moe_gpt.post_training.chat import SPECIAL_TOKENS, TURN_END
from moe_gpt.post_training.eyes import Opened, pieces_of
from moe_gpt.post_training.pictured import row_of
from moe_gpt.vision.encoders import SmallEncoder
from moe_gpt.vision.examples import Example

TOKENIZER = train_tokenizer(["the quick brown fox jumps over the lazy dog.\n"] * 20, 280)
CHAT = TOKENIZER.with_special_tokens(SPECIAL_TOKENS)


class Noise:
    """A picture that training draws."""

    def pixels(self, size: int) -> torch.Tensor:
        """Return it."""
        return noise(1, size)


def loaded_with(tokenizer: Tokenizer, **changes: object) -> LanguageModel:
    """A model that sees."""
    model = give_eyes(tiny_text_model(tokenizer.vocab_size, **changes))
    return LanguageModel(model, tokenizer, Path("runs/sees"))


@pytest.fixture
def picture(tmp_path) -> str:
    """A file with the picture that training draws."""
    path = tmp_path / "noise.png"
    Image.fromarray(noise(1).permute(1, 2, 0).numpy()).save(path)
    return str(path)


def data_url(path: str) -> str:
    """A file as a data URL, in lines as ``base64`` writes it."""
    return "data:image/png;base64," + base64.encodebytes(Path(path).read_bytes()).decode()


@pytest.mark.parametrize("tokenizer", [TOKENIZER, CHAT], ids=["base", "chat"])
def test_use_spells_what_training_spells(tokenizer, picture):
    """A conversation has the tokens and places of a row, and the answer begins where the row's does."""
    loaded = loaded_with(tokenizer)
    turn = ("The <image> shows", " a fox.")
    row = row_of(Example((turn,), (Noise(),)), tokenizer)
    opened = loaded.eyes.open(picture)
    asked = [{"role": "user", "content": ["The ", opened, " shows"]}]
    text = loaded.eyes.spell_conversation(asked)
    assert text.ids == row.text.ids[: row.start]
    assert text.places == row.text.places
    if tokenizer is TOKENIZER:
        ids, beside = loaded.look("The <image> shows", [picture])
        assert (ids, beside.places) == (text.ids, text.places)
        assert loaded.look("shows", [picture, picture]).beside.places == [0, 1]
    two = row_of(Example((turn, turn), (Noise(), Noise())), tokenizer)
    again = loaded.eyes.spell_conversation([*asked, {"role": "assistant", "content": " a fox."}, *asked])
    assert (again.ids, again.places) == (two.text.ids[: two.start], two.text.places)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, CHAT], ids=["base", "chat"])
def test_an_answer_depends_on_the_picture_and_text_alone_does_not(tokenizer, picture):
    """By ``generate`` and ``chat``; paths, bytes and data URLs are the same picture."""
    loaded, white = loaded_with(tokenizer), io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), "white").save(white, "PNG")
    forms = [picture, Path(picture), Path(picture).read_bytes(), data_url(picture)]
    kept = {"temperature": 0, "max_new_tokens": 12}
    answers = {loaded.generate("fox", images=[form], **kept) for form in forms}
    assert len(answers) == 1
    assert loaded.generate("fox", images=[white.getvalue()], **kept) not in answers
    text = LanguageModel(tiny_text_model(tokenizer.vocab_size), tokenizer, Path("runs/text"))
    assert loaded.generate("<image>fox", **kept) == text.generate("<image>fox", **kept)
    urls = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "image_url", "image_url": picture}]
    parts = [*urls, {"type": "image", "image": picture}, {"type": "image", "path": picture}]
    asked = [[{"role": "user", "content": [part, {"type": "text", "text": "fox"}]}] for part in parts]
    answers = {loaded.chat(messages, max_new_tokens=12) for messages in asked}
    assert len(answers) == 1
    asked[0][0]["content"][0] = {"type": "image", "image": white.getvalue()}
    assert loaded.chat(asked[0], max_new_tokens=12) not in answers


def test_the_next_turn_sees_the_picture_and_encodes_nothing(picture, monkeypatch):
    """A conversation keeps it; the last picture before a token is the one seen."""
    loaded, calls, forward = loaded_with(CHAT, max_seq_len=300), [], SmallEncoder.forward
    monkeypatch.setattr(SmallEncoder, "forward", lambda self, x: calls.append(x) or forward(self, x))
    dialogue = make_dialogue(loaded, max_new_tokens=5)
    messages = [{"role": "user", "content": [loaded.eyes.open(picture), "fox"]}]
    list(dialogue.reply(messages))
    messages.append({"role": "user", "content": "dog"})
    blind = [messages[0] | {"content": "fox"}, *messages[1:]]
    pieces = [list(dialogue.reply(each)) for each in (messages, blind)]
    assert len(calls) == 1
    assert pieces[0] != pieces[1]
    assert messages[-1]["role"] == "assistant"


def test_many_pictures_are_forgotten_not_kept(monkeypatch):
    """Features of the latest ones stay."""
    monkeypatch.setattr("moe_gpt.post_training.eyes._KEPT", 3)
    eyes = loaded_with(TOKENIZER).eyes
    for seed in range(9):
        assert eyes.features([Opened(noise(seed), str(seed))]).shape == (1, 4, 16)
    assert list(eyes._features) == ["6", "7", "8"]


def test_markers_stand_for_as_many_pictures():
    """None at all, and the pictures come first; other numbers are refused with both."""
    a, b = Opened(noise(1), "a"), Opened(noise(2), "b")
    assert pieces_of("x<image>y<image>", [a, b]) == ["x", a, "y", b]
    assert pieces_of("xy", [a, b]) == [a, b, "xy"]
    assert pieces_of("", [a]) == [a]
    with pytest.raises(InputError, match="<image> 3 times, the number of pictures is 2"):
        pieces_of("<image><image>x<image>", [a, b])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "image": "nosuch.png"}], r"messages.0.content.0.image: nosuch.png is not there"),
        ([{"type": "image", "image": "https://a.b/c.png"}], r"https://a.b/c.png', which is not fetched"),
        (
            [{"type": "image_url", "image_url": {"url": "data:image/png;base64,???"}}],
            "image_url.url: it must be data:im",
        ),
        ([{"type": "image_url", "image_url": {"url": "data:text/plain;base64,aaaa"}}], "it must be data:image"),
        ([{"type": "image_url", "image_url": {}}], "content.0.image_url.url must be a picture, got none"),
        ([{"type": "image", "image": 7}], "must be a path, a data URL or bytes, got int"),
        ([{"type": "image", "image": b"hello"}, {"type": "video"}], r"content.0 must be a text part"),
        ([{"type": "image", "image": b"hello"}], "the picture must be PNG"),
    ],
)
def test_parts_that_cannot_be_used_are_named(content, message):
    """With the message, the part and the cause."""
    with pytest.raises(InputError, match=message):
        loaded_with(CHAT).chat([{"role": "user", "content": content}])


def test_what_cannot_have_pictures_says_so(picture):
    """A text model, a system's message, a list that is none, a model without turns and its system."""
    text = LanguageModel(tiny_text_model(CHAT.vocab_size), CHAT, Path("runs/text"))
    part = {"type": "image", "image": picture}
    with pytest.raises(InputError, match=r"runs/text sees no pictures"):
        text.generate("x", images=[picture])
    with pytest.raises(InputError, match=r"runs/text sees no pictures"):
        text.chat([{"role": "user", "content": [part]}])
    sees = loaded_with(CHAT)
    with pytest.raises(InputError, match=r"messages.0: only a user's message may have pictures, got one of 'system'"):
        sees.chat([{"role": "system", "content": [part]}, {"role": "user", "content": "x"}])
    with pytest.raises(InputError, match="put it into a list"):
        sees.generate("x", images=picture)
    with pytest.raises(InputError, match="trained without turns"):
        loaded_with(TOKENIZER).chat([{"role": "system", "content": "x"}, {"role": "user", "content": [part]}])


def test_an_animation_is_said_once(tmp_path):
    """As a warning that names the file."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"a.gif: animated") as found:
        loaded_with(TOKENIZER).generate("x", images=[tmp_path / "a.gif"], max_new_tokens=2)
    assert len(found) == 1


def test_quantised_text_still_sees(picture):
    """The eyes keep their type."""
    loaded, seen = loaded_with(TOKENIZER), []
    quantise(loaded.model, "int8")
    for images in ([picture], []):
        seen.append(loaded.generate("fox", images=images, temperature=0, max_new_tokens=12))
    assert seen[0] != seen[1]


def test_a_base_models_answer_ends_at_end_of_text():
    """Special tokens of turns end it where there are some."""
    assert loaded_with(TOKENIZER).eyes.ends == [TOKENIZER.end_of_text_id]
    assert loaded_with(CHAT).eyes.ends == [CHAT.end_of_text_id, CHAT.special_id(TURN_END)]
