"""The demonstration that learns to hear: what it is taught and tested with, and that the same seed repeats it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("jiwer", reason="needs '.[hear]'")
pytest.importorskip("espeakng_loader", reason="needs '.[hear]'")

from moe_gpt.commands.hear import HearOptions, hear
from moe_gpt.errors import InputError
from moe_gpt.speech.from_scratch import END, START, join_digits, learn_tokenizer, narrow, rate, roughen, targets_of
from moe_gpt.speech.recogniser import Recogniser
from moe_gpt.speech.sentences import ACCENTS, HOUSEHOLD, draw, is_held_out, split_variants
from moe_gpt.speech.sound import RATE
from moe_gpt.speech.synthesis import Speaker, Synthesiser

pytestmark = pytest.mark.slow

SAY = """
import hashlib
from moe_gpt.speech.synthesis import Speaker, Synthesiser
s = Synthesiser()
said = [s.say(text, Speaker("gmw/en", "m1")).tobytes() for text in ("one two", "turn on the light", "one two")]
print(hashlib.sha256(b"".join(said)).hexdigest())
"""


def test_the_same_sentences_in_the_same_order_sound_the_same():
    """In another process; alone, a sentence may sound otherwise."""
    digests = {subprocess.run([sys.executable, "-c", SAY], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(digests) == 1


def test_voices_that_are_not_there_are_refused():
    """espeak-ng itself would speak on with another variant."""
    synthesiser = Synthesiser()
    with pytest.raises(InputError, match="no variant nosuch"):
        synthesiser.say("one", Speaker("gmw/en", "nosuch"))
    with pytest.raises(InputError, match="no accent gmw/xx"):
        synthesiser.say("one", Speaker("gmw/xx", "m1"))
    sound = synthesiser.say("one two three", Speaker("gmw/en", "m1"))
    assert sound.dtype == np.float32
    assert 0.3 * RATE < len(sound) < 3 * RATE
    assert 0.05 < np.abs(sound).max() <= 1


def test_training_and_tests_share_no_sentence_and_no_new_voice():
    """A fifth of the household sentences is held out."""
    rng = np.random.default_rng(0)
    variants, new = split_variants(Synthesiser().variants(), rng)
    assert (len(variants), len(new)) == (40, 6)
    assert not set(variants) & set(new)
    taught, tested = (draw(rng, 300, ACCENTS, variants, held_out=held_out) for held_out in (False, True))
    assert not {said.text for said in taught} & {said.text for said in tested}
    assert 0.1 < np.mean([is_held_out(text) for text in HOUSEHOLD]) < 0.3


def test_targets_end_and_are_not_padded_with_words():
    """The decoder's start is not a target; what is behind the end is ignored."""
    tokenizer = learn_tokenizer(["one two three", "four"] * 10)
    long, short = targets_of(["one two three", "four"], tokenizer)
    end = tokenizer.convert_tokens_to_ids(END)
    assert long[-1] == end
    kept = short[short >= 0].tolist()
    assert kept[-1] == end
    assert tokenizer.convert_tokens_to_ids(START) not in kept
    assert tokenizer.decode(kept[:-1]) == "four"


def test_features_are_shifted_and_masked_but_keep_their_shape():
    """A row of ones keeps ones outside its masked band, up to the noise."""
    rough = roughen(torch.ones(4, 80, 100), torch.Generator().manual_seed(0))
    assert rough.shape == (4, 80, 100)
    assert ((rough == 0).all(2).sum(1) == 12).all()
    assert abs(rough[rough != 0].mean() - 1) < 0.01


def test_narrow_sound_has_nothing_above_four_kilohertz():
    """What is below stays."""
    time = np.arange(RATE) / RATE
    low, high = (np.sin(2 * np.pi * pitch * time).astype(np.float32) for pitch in (1000, 6000))
    middle = slice(RATE // 4, RATE // 2)
    np.testing.assert_allclose(narrow(low + high)[middle], low[middle], atol=0.01)


def test_the_word_error_rate_counts_all_three_kinds():
    """One wrong, one missing and one additional word of six."""
    assert rate(
        ["one two three", "four five six"],
        [
            "one nine three",
            "four five",
        ],
    ) == pytest.approx(2 / 6)
    assert rate(["one two three"], ["one two two three"]) == pytest.approx(1 / 3)


def test_a_short_run_writes_a_model_and_its_scores(tmp_path, capsys):
    """The same seed gives the same weights; transcribe reads the folder; a person's digits are tested too."""
    for digit in range(10):
        soundfile.write(tmp_path / f"{digit}.wav", Synthesiser().say(str(digit), Speaker("gmw/en", "m2")), RATE)
    options = HearOptions(steps=3, clips=64, human=tmp_path)
    digests = set()
    for name in ("a", "b"):
        words = ["hear", str(tmp_path / name), "--steps", "3", "--clips", "64", "--human", str(tmp_path)]
        subprocess.run([sys.executable, "-m", "moe_gpt", *words], check=True, capture_output=True)
        digests.add(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())["after"]
    assert set(scores) == {"known_voices", "new_voices", "new_accents", "human", "best_constant", "shuffled_sound"}
    assert all(score["n"] >= 100 and score["score"] > 0.5 for score in scores.values())
    assert Recogniser(tmp_path / "a").window_seconds == 4
    with pytest.raises(InputError, match="is not empty"):
        hear(tmp_path / "a", options=options)
    assert len(join_digits(tmp_path, np.random.default_rng(0)).texts) == 100
    capsys.readouterr()
