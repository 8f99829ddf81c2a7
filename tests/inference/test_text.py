"""Text of tokens that arrive one by one: nothing is lost, characters are whole, stop strings end it."""

import random

import pytest

from moe_gpt.data.tokenizer import train_tokenizer
from moe_gpt.inference.text import TextStream

TOKENIZER = train_tokenizer(["the quick brown fox. ", "größer 東京 \U0001f600\U0001f680 "] * 20, 320)


def read(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """Return the pieces of a stream, and whether a stop string ended it."""
    stream = TextStream(TOKENIZER, (), stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()], stream.is_stopped


def first_stop(ids: list[int], stop: tuple[str, ...]) -> str | None:
    """Return the text before the stop string that is completed first, by looking at the text of every prefix."""
    for n in range(1, len(ids) + 1):
        text = TOKENIZER.decode(ids[:n])
        text = text if n == len(ids) else text.rstrip("\ufffd")  # an incomplete character
        if ends := [(text.find(string) + len(string), -len(string)) for string in stop if string in text]:
            end, negative = min(ends)
            return text[: end + negative]
    return None


def test_pieces_of_random_tokens_are_the_decoded_text():
    """300 lists of arbitrary tokens, broken characters included, lose nothing."""
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(TOKENIZER.vocab_size) for _ in range(rng.randrange(1, 12))]
        assert "".join(read(ids)[0]) == TOKENIZER.decode(ids)


def test_characters_of_several_tokens_come_whole():
    """A piece never ends inside a character."""
    text = "東京 \U0001f680!"
    pieces = read(TOKENIZER.encode(text))[0]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stop_strings_are_those_that_scanning_the_text_finds():
    """1,500 texts with one to three stop strings: the text before the first completed one, and nothing of it."""
    rng, n_stopped = random.Random(1), 0
    for _ in range(300):
        ids = TOKENIZER.encode("".join(rng.choice("ab東 ") for _ in range(rng.randrange(1, 14))))
        stop = tuple(
            "".join(rng.choice("ab東 ") for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4))
        )
        pieces, is_stopped = read(ids, stop)
        expected = first_stop(ids, stop)
        assert is_stopped == (expected is not None)
        assert "".join(pieces) == (TOKENIZER.decode(ids) if expected is None else expected)
        n_stopped += is_stopped
    assert 100 < n_stopped < 1400  # both happen


@pytest.mark.parametrize("stop", [("",), ()])
def test_an_empty_stop_string_stops_nothing(stop):
    """It would be in every text."""
    ids = TOKENIZER.encode("the fox")
    assert read(ids, stop) == (read(ids)[0], False)


def test_what_may_begin_a_stop_string_is_shown_at_the_end():
    """Held back while it may be one, and shown once the answer ends without it."""
    pieces, is_stopped = read(TOKENIZER.encode("the fox"), ("x!",))
    assert "".join(pieces) == "the fox"
    assert pieces[-1] == "x"
    assert not is_stopped
