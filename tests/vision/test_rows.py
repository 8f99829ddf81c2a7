"""Rows of text with pictures: every form that is read, and every error with its file, its row and its cause."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.post_training.chat import SPECIAL_TOKENS, mark, render
from moe_gpt.post_training.pictured import check_pictures, read_pictured, render_pictured
from moe_gpt.vision.examples import training_example
from moe_gpt.vision.pictured_text import Row

PARTS = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "What?"}]
ROW = {"images": ["red.png"], "prompt": "<image>What?", "text": " red"}


@pytest.fixture(scope="module")
def tokenizer(corpus_dir) -> Tokenizer:
    """A tokenizer of a base model: end-of-text alone is special."""
    return made_from((corpus_dir / "prose_00.txt").read_text())


def made_from(text: str) -> Tokenizer:
    """Train a tokenizer."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def chatting(tokenizer) -> Tokenizer:
    """A tokenizer with the marks of a chat template."""
    return tokenizer.with_special_tokens(SPECIAL_TOKENS)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a red and a blue picture."""
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, *rows: object) -> Path:
    """Write rows, those that are texts as they are."""
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(folder: Path, tokenizer: Tokenizer, *rows: object) -> list[Row]:
    """Write rows and read them."""
    return read_pictured([write(folder, *rows)], tokenizer)


def colour_of(row: Row, number: int = 0) -> list[int]:
    """The colour in the middle of a picture."""
    return row.text.pictures[number].pixels(16)[:, 8, 8].tolist()


def test_a_row_is_prompt_pictures_and_answer(folder, tokenizer):
    """A picture stands at a line end; the answer alone is learnt, with the end of the text."""
    prompt = "One <image> two<image>?"
    (row,) = read(folder, tokenizer, {"images": ["red.png", "blue.png"], "prompt": prompt, "text": " red"})
    (line_end,) = tokenizer.encode("\n")
    pieces = [tokenizer.encode(text) for text in ("One ", " two", "?")]
    answer = [*tokenizer.encode(" red"), tokenizer.end_of_text_id]
    assert row.text.ids == [*pieces[0], line_end, *pieces[1], line_end, *pieces[2], *answer]
    assert row.text.places == [len(pieces[0]), len(pieces[0]) + 1 + len(pieces[1])]
    assert row.text.is_answer == [False] * row.start + [True] * len(answer)
    assert row.text.ids[row.start :] == answer
    assert [colour_of(row, number) for number in range(2)] == [[255, 0, 0], [0, 0, 255]]


def test_without_a_marker_pictures_come_first(folder, tokenizer):
    """All of them, in their order."""
    (row,) = read(folder, tokenizer, {"images": ["red.png", "blue.png"], "prompt": "What?", "text": " red"})
    assert row.text.places == [0, 1]


def test_a_text_cannot_pretend_to_have_a_picture(folder, tokenizer, chatting):
    """The marker in an answer, or in a part that is text, is its letters."""
    (row,) = read(folder, tokenizer, ROW | {"text": " <image>\n"})
    assert len(row.text.places) == 1
    assert tokenizer.decode(row.text.ids[row.start : -1]) == " <image>\n"
    parts = [{"type": "text", "text": "<image>"}, {"type": "image", "image": "red.png"}]
    says = [{"role": "user", "content": parts}, {"role": "assistant", "content": "<image>"}]
    (row,) = read(folder, chatting, {"messages": says})
    assert len(row.text.places) == 1
    assert chatting.decode(row.text.ids).count("<image>") == 2


def data_url(path: Path) -> str:
    """A picture as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_conversations_have_pictures_in_every_usual_form(folder, chatting):
    """OpenAI's image_url, parts with a path, parts that take the listed pictures in turn."""
    url, ask = data_url(folder / "red.png"), {"type": "text", "text": "What?"}
    contents = [
        [{"type": "image_url", "image_url": {"url": url}}, ask],
        [{"type": "image_url", "image_url": "red.png"}, ask],
        *([{"type": "image", key: "red.png"}, ask] for key in ("image", "url", "path")),
    ]
    listed = [[{"type": "image"}, ask]]
    says = [{"role": "assistant", "content": " red "}]
    rows = [{"messages": [{"role": "user", "content": content}, *says]} for content in contents]
    rows += [{"messages": [{"role": "user", "content": x}, *says], "images": ["red.png"]} for x in listed]
    found = read(folder, chatting, *rows)
    without = render([{"role": "user", "content": "What?"}, *says], chatting)
    (line_end,) = chatting.encode("\n")
    at = len(render([{"role": "user", "content": ""}], chatting).ids) - 2
    for row in found:
        assert row.text.places == [at]
        assert row.text.ids == [*without.ids[:at], line_end, *without.ids[at:]]
        assert row.text.is_answer == [*without.is_answer[:at], False, *without.is_answer[at:]]
        assert colour_of(row) == [255, 0, 0]


def test_for_a_model_that_chats_prompt_and_text_are_turns(folder, chatting):
    """So that the finished model answers in a chat."""
    first, second = read(
        folder,
        chatting,
        ROW,
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "red"}]},
    )
    assert first.text[:3] == second.text[:3]
    asked = render_pictured([{"role": "user", "content": [object(), "What?"]}], chatting, add_generation_prompt=True)
    assert first.text.ids[: first.start] == asked.ids
    assert first.text.ids[-2] == mark("<|im_end|>", chatting)


SAYS = {"role": "assistant", "content": "red"}
BAD = {
    "missing": (ROW | {"images": ["no.png"]}, r"images.0: .*no\.png is not there"),
    "folder": (ROW | {"images": ["."]}, r"images.0: .* is no file"),
    "empty file": (ROW | {"images": ["empty.png"]}, r"images.0: .*empty\.png must be PNG"),
    "text": (ROW | {"images": ["text.png"]}, r"images.0: .*text\.png must be PNG"),
    "too many pixels": (ROW | {"images": ["huge.png"]}, r"images.0: .*it has 12,000 x 12,000 pixels"),
    "a bomb": (ROW | {"images": ["bomb.png"]}, r"images.0: .*bomb\.png.*(20,000 x 20,000|decompression bomb)"),
    "two markers": (ROW | {"prompt": "<image><image>"}, "prompt has 2 <image>, and images has 1"),
    "one marker": (ROW | {"images": ["red.png"] * 2}, "prompt has 1 <image>, and images has 2"),
    "marker alone": ({"prompt": "<image>a", "text": "b"}, "prompt has 1 <image>, and images has 0"),
    "no picture": ({"images": [], "prompt": "a", "text": "b"}, "it has no picture, and of text alone"),
    "no list": (ROW | {"images": "red.png"}, "images must be a list of paths or data URLs, got 'red.png'"),
    "no path": (ROW | {"images": [7]}, "images.0 must be a path or a data URL, got 7"),
    "elsewhere": (ROW | {"images": ["https://a.b/c.png"]}, "images.0 must be a path or a data URL.*not fetched"),
    "no base64": (ROW | {"images": ["data:image/png;base64,%%"]}, "images.0: it must be data:image/TYPE;base64"),
    "no picture inside": (ROW | {"images": ["data:image/png;base64,AAAA"]}, "images.0: the picture must be PNG"),
    "no text": ({"images": ["red.png"], "prompt": "a"}, "it must have images, prompt and text.*missing: text"),
    "no text nor prompt": ({"images": ["red.png"]}, "it must have images, prompt and text.* missing: prompt and text"),
    "one key for another": ({"image": "red.png", "prompt": "<image>a", "text": "b"}, "image is no key of a row; write"),
    "two ways": (ROW | {"messages": [SAYS]}, "it must have messages, or prompt and text, got both; keep one"),
    "base64 alone": (ROW | {"images": ["/9j/" + "iVBORw0KGgo" * 400]}, "images.0: .* base64 must have data:image/TYPE"),
    "Windows": (ROW | {"images": ["a\\\\b.png"]}, "images.0: .* is not there; write / for"),
    "a table": ("image,text", "it must be a JSON object in one line .jsonl has one in each., got 'image,text'"),
    "empty text": (ROW | {"text": " "}, "text must be an answer, got an empty text"),
    "number": (ROW | {"text": 3}, "text must be text, got 3"),
    "no JSON": ("{", "it must be a JSON object in one line"),
    "answers with a picture": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image"}]}]},
        "messages.1: only a user's turn may have pictures",
    ),
    "part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, SAYS]}, "messages.0.content.0 must be"),
    "places": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, SAYS]},
        "messages have 1 parts for listed pictures, and images has 0",
    ),
    "no turns": ({"messages": "a", "images": ["red.png"]}, "messages must be a list of turns, got 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_an_error_with_file_row_and_cause(folder, chatting, name):
    """Before anything is trained."""
    row, cause = BAD[name]
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    for file, side in (("huge.png", 12_000), ("bomb.png", 20_000)):
        whole = (folder / "red.png").read_bytes()
        (folder / file).write_bytes(whole[:16] + side.to_bytes(4, "big") * 2 + _crc_of(whole, side) + whole[33:])
    path = write(folder, ROW, "", row)
    with pytest.raises(InputError, match=f"(?s)^{path} row 3: {cause}"):
        check_pictures(read_pictured([path], chatting))


def _crc_of(png: bytes, side: int) -> bytes:
    """What follows the size in a PNG's header, with a new checksum."""
    import zlib

    header = b"IHDR" + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[24:29] + zlib.crc32(header).to_bytes(4, "big")


def test_conversations_need_a_chat_template(folder, tokenizer):
    """A base model has none."""
    says = [{"role": "user", "content": [{"type": "image", "image": "red.png"}]}, SAYS]
    with pytest.raises(InputError, match="row 1: messages need a model with a chat template"):
        read(folder, tokenizer, {"messages": says})


def test_a_picture_that_is_damaged_behind_its_header_is_an_error_of_its_row(folder, tokenizer):
    """Cut in half, with a byte that is another, and of more bytes than a picture has."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.png").write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    (folder / "long.png").write_bytes(whole)
    os.truncate(folder / "long.png", 1 << 40)
    for name, cause in (("cut", " cannot be read"), ("flipped", " cannot be read"), ("long", ": the file has 1,099,")):
        rows = read(folder, tokenizer, ROW, ROW | {"images": ["red.png", f"{name}.png"], "prompt": "?"}, ROW)
        with pytest.raises(InputError, match=rf"rows\.jsonl row 2: images\.1: .*{name}\.png{cause}"):
            check_pictures(rows)


def test_a_picture_is_known_by_its_bytes(folder, tokenizer):
    """Under whatever name: one that was changed is another, and equal ones are on one side of a split."""
    (folder / "same.png").write_bytes((folder / "red.png").read_bytes())
    rows = read(folder, tokenizer, *(ROW | {"images": [f"{name}.png"]} for name in ("red", "same", "blue")))
    red, same, blue = (row.text.pictures[0].digest for row in check_pictures(rows)[0])
    assert red == same != blue


def test_animated_pictures_are_told_once(folder, tokenizer):
    """With their number."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    path = write(folder, *[ROW | {"images": ["moves.gif"]}] * 3)
    assert list(check_pictures(read_pictured([path], tokenizer))[1].values()) == [3]


def test_digits_of_the_tests_are_none_of_the_training():
    """And the text reads them out."""
    pytest.importorskip("sklearn")
    from moe_gpt.vision.examples import digits, test_examples

    kept = {number for example in test_examples("digits")["digits"] for number in example.pictures[0].chosen}
    learnt = {number for k in range(500) for number in training_example("digits", k).pictures[0].chosen}
    assert not kept & learnt
    seen = {number for example in test_examples("digits")["digits_seen"] for number in example.pictures[0].chosen}
    assert seen
    assert not kept & seen
    example = digits("a")
    assert len(example.turns[0][1].split()) == len(example.pictures[0].chosen)
    assert example.pictures[0].pixels(64).equal(digits("a").pictures[0].pixels(64))


def test_scenes_of_the_tests_are_none_of_the_training():
    """Neither by name nor by what is drawn; those of pairs that no training has are told apart."""
    from moe_gpt.vision.examples import test_examples
    from moe_gpt.vision.scenes import HELD_OUT

    learnt = {scene for number in range(3000) for scene in training_example("scenes", number).pictures}
    drawn = {scene.shapes for scene in learnt}
    for task, examples in test_examples("scenes").items():
        for scene in (scene for example in examples for scene in example.pictures):
            assert scene not in learnt
            assert scene.shapes not in drawn
            has_held_out = bool({(shape.colour, shape.name) for shape in scene.shapes} & set(HELD_OUT))
            assert has_held_out == (task == "caption_held_out")


def test_answers_on_scenes_are_right():
    """Numbers and colours, counted here anew, and what a random object would score."""
    from moe_gpt.vision.examples import colour, count

    numbers, chances = set(), set()
    for name in map(str, range(100)):
        ((_, said),), (scene,), _ = count(name)
        assert said == {1: " one.", 2: " two.", 3: " three."}[len(scene.shapes)]
        numbers.add(said)
        ((asked, said),), (scene,), chance = colour(name)
        (right,) = [shape.colour for shape in scene.shapes if shape.name == asked.split()[-1]]
        assert said == f" is {right}."
        assert chance == [shape.colour for shape in scene.shapes].count(right) / len(scene.shapes)
        chances.add(round(chance, 2))
    assert len(numbers) == 3
    assert {0.33, 0.5, 0.67} <= chances


def test_examples_follow_from_their_numbers():
    """And are what they say: of 600 scenes, none has a held-out pair, and the captions name each shape."""
    from moe_gpt.vision.scenes import HELD_OUT, Scene

    for number in range(600):
        example = training_example("scenes", number)
        assert example == training_example("scenes", number)
        for scene in example.pictures:
            assert isinstance(scene, Scene)
            assert not {(shape.colour, shape.name) for shape in scene.shapes} & set(HELD_OUT)
            assert [shape.x for shape in scene.shapes] == sorted(shape.x for shape in scene.shapes)
    first, again = (training_example("scenes", 0).pictures[0].pixels(64) for _ in range(2))
    assert first.equal(again)
    assert first.dtype == torch.uint8
    held_out = Scene("a", has_held_out=True).shapes
    assert {(shape.colour, shape.name) for shape in held_out} & set(HELD_OUT)
