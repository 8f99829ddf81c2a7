"""A Whisper of 0.6 M parameters trained on synthesised speech: transformers' classes, our recipe and scores.

Source of model and features: Radford et al. 2022, arXiv 2212.04356.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import numpy as np
import soxr
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from moe_gpt.speech.recogniser import Recogniser
from moe_gpt.speech.sentences import ACCENTS, DIGITS, NEW_ACCENTS, Said, draw, split_variants
from moe_gpt.speech.sound import RATE, Samples, read_sound
from moe_gpt.speech.synthesis import Synthesiser

SECONDS, MELS, WIDTH, LAYERS, HEADS, VOCAB, MOST_TOKENS = 4, 80, 96, 2, 4, 400, 40
CLIPS, STEPS, BATCH, WARM_UP, LEAST_SHARE = 6000, 2000, 16, 100, 0.05
RATE_OF_MATRICES, RATE_OF_THE_REST = 4e-3, 1.5e-3
TEST_CLIPS, NARROW_SHARE, MOST_SHIFT, MASKED_MELS, NOISE = 150, 0.4, 20, 12, 0.05
END, START = "<|endoftext|>", "<|startoftranscript|>"
Say = Callable[[str], None]


class Clips(NamedTuple):
    """Sentences and their sounds."""

    texts: list[str]
    sounds: list[Samples]


def say_all(said: Sequence[Said], synthesiser: Synthesiser) -> Clips:
    """Return sentences, said in their order; the ones that the model's window cannot hold are left out."""
    clips = [(each.text, synthesiser.say(*each)) for each in said]
    fitting = [(text, sound) for text, sound in clips if len(sound) <= SECONDS * RATE]
    return Clips([text for text, _ in fitting], [sound for _, sound in fitting])


def with_telephones(clips: Clips, rng: np.random.Generator) -> Clips:
    """Return clips of which a random part has the band of a telephone."""
    is_narrow = rng.random(len(clips.sounds)) < NARROW_SHARE
    return clips._replace(
        sounds=[narrow(sound) if so else sound for sound, so in zip(clips.sounds, is_narrow, strict=True)]
    )


def join_digits(folder: Path, rng: np.random.Generator, n: int = 100) -> Clips:
    """Return strings of two to four digits from recordings ``0.wav`` to ``9.wav`` of a person.

    Raises:
        InputError: where a recording is missing or bad.
    """
    recorded = [read_sound(folder / f"{digit}.wav") for digit in range(10)]
    drawn = [rng.integers(0, 10, rng.integers(2, 5)).tolist() for _ in range(n)]
    joined = [np.concatenate([recorded[digit] for digit in digits])[: SECONDS * RATE] for digits in drawn]
    return Clips([" ".join(DIGITS[digit] for digit in digits) for digits in drawn], joined)


def narrow(sound: Samples) -> Samples:
    """Return a sound without what is above 4 kHz, as a file of 8 kHz has it."""
    return soxr.resample(soxr.resample(sound, RATE, RATE // 2), RATE // 2, RATE)


def learn_tokenizer(texts: Sequence[str]) -> Any:
    """Return a byte-level BPE of 400 tokens for transformers, which frames a text with start and end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[END, START], initial_alphabet=alphabet, show_progress=False
        ),
    )
    frame = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=frame)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END
    )


def new_model(tokenizer: Any) -> Any:
    """Return ``WhisperForConditionalGeneration`` with random weights, at a size for two cores."""
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    tokens = {"bos_token_id": start, "decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end}
    values: dict[str, Any] = {"vocab_size": len(tokenizer), "d_model": WIDTH, "num_mel_bins": MELS} | tokens
    for part in ("encoder", "decoder"):
        values |= {f"{part}_layers": LAYERS, f"{part}_attention_heads": HEADS, f"{part}_ffn_dim": 4 * WIDTH}
    values |= {"max_source_positions": SECONDS * 50, "max_target_positions": MOST_TOKENS}
    config = transformers.WhisperConfig(**values, suppress_tokens=None, begin_suppress_tokens=None)
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(**tokens, max_length=MOST_TOKENS)
    return model


def features_of(sounds: Sequence[Samples], extractor: Any) -> Tensor:
    """Return log-mel features in half precision: shape (n_sounds, MELS, 100 * SECONDS)."""
    parts = [sounds[start : start + 256] for start in range(0, len(sounds), 256)]
    return torch.cat(
        [extractor(part, sampling_rate=RATE, return_tensors="pt")["input_features"].half() for part in parts]
    )


def roughen(features: Tensor, generator: torch.Generator) -> Tensor:
    """Return features (batch, mels, frames) shifted in time, with noise and a band masked, each row in its own way."""
    batch, mels, frames = features.shape
    shift = torch.randint(0, MOST_SHIFT + 1, (batch, 1), generator=generator)
    place = (torch.arange(frames) - shift) % frames
    features = features.gather(2, place[:, None].expand(-1, mels, -1))
    first = torch.randint(0, mels - MASKED_MELS, (batch, 1), generator=generator)
    masked = (torch.arange(mels) >= first) & (torch.arange(mels) < first + MASKED_MELS)
    noise = NOISE * torch.randn(features.shape, generator=generator)
    return (features + noise).masked_fill(masked[..., None], 0.0)


def share_of_rate(step: int, steps: int) -> float:
    """Return the learning rate of a step over the highest: up in a line, then down along a cosine."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LEAST_SHARE + (1 - LEAST_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    folder: Path, seed: int, steps: int = STEPS, n_clips: int = CLIPS, human: Path | None = None, say: Say = print
) -> dict[str, Any]:
    """Train a model, save it as a folder of transformers, and return its word error rates.

    Args:
        folder: where the model goes.
        seed: of sentences, speakers, weights and order.
        steps: of 16 clips each.
        n_clips: number of sentences that are said for training.
        human: folder with a person's digits, to be tested with too.
        say: told about progress.
    """
    if human is not None:
        join_digits(human, np.random.default_rng())  # what is lacking there is told before the long part
    rng, synthesiser = np.random.default_rng(seed), Synthesiser()
    variants, new_variants = split_variants(synthesiser.variants(), rng)
    say(f"saying {n_clips:,} sentences with {len(ACCENTS) * len(variants)} voices")
    taught = with_telephones(say_all(draw(rng, n_clips, ACCENTS, variants, held_out=False), synthesiser), rng)
    places = {
        "known_voices": (ACCENTS, variants),
        "new_voices": (ACCENTS, new_variants),
        "new_accents": (NEW_ACCENTS, variants),
    }
    tests = {name: say_all(draw(rng, TEST_CLIPS, *place, held_out=True), synthesiser) for name, place in places.items()}
    if human is not None:
        tests["human"] = join_digits(human, rng)
    tokenizer = learn_tokenizer(taught.texts)
    extractor = transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS)
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    fit(model, features_of(taught.sounds, extractor), targets_of(taught.texts, tokenizer), steps, say)
    for part in (model, tokenizer, extractor):
        part.save_pretrained(folder)
    return score(Recogniser(folder), tests, sorted(set(taught.texts)))


def targets_of(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Return what the decoder must say after its start token: (n_texts, n_tokens), -100 behind the end."""
    rows = [torch.tensor(ids[1:]) for ids in tokenizer(list(texts))["input_ids"]]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def fit(model: Any, features: Tensor, targets: Tensor, steps: int, say: Say) -> None:
    """Train a model in place on random batches."""
    generator = torch.Generator().manual_seed(int(torch.initial_seed()) % 2**31)
    optimizers = optimizers_of(model)
    shares = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: share_of_rate(step, steps)) for each in optimizers]
    model.train()
    for step in range(steps):
        rows = torch.randint(0, len(features), (BATCH,), generator=generator)
        labels = targets[rows]
        labels = labels[:, : int((labels >= 0).sum(1).max())]
        loss = model(input_features=roughen(features[rows].float(), generator), labels=labels).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, share in zip(optimizers, shares, strict=True):
            optimizer.step()
            share.step()
        if step % 100 == 99:
            say(f"step {step + 1:,} of {steps:,}: ce_loss {loss.item():.3f}")


def optimizers_of(model: Any) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of attention and feed-forward networks, and AdamW for the rest."""
    of_kind: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, value in model.named_parameters():
        of_kind[value.ndim == 2 and "embed" not in name].append(value)
    return [
        torch.optim.Muon(of_kind[True], lr=RATE_OF_MATRICES, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(of_kind[False], lr=RATE_OF_THE_REST, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def score(hears: Recogniser, tests: dict[str, Clips], known: Sequence[str]) -> dict[str, Any]:
    """Return word error rates: of each test, and of two that hear nothing.

    Args:
        hears: the model.
        tests: clips by name; the baselines are of ``new_voices``.
        known: sentences of the training, the best of which is the constant answer.
    """
    said = {name: [heard.text for heard in hears(clips.sounds)] for name, clips in tests.items()}
    rates = {name: rate(clips.texts, said[name]) for name, clips in tests.items()}
    right = tests["new_voices"].texts
    rates["best_constant"] = min(rate(right, [text] * len(right)) for text in known)
    rates["shuffled_sound"] = rate(right, said["new_voices"][1:] + said["new_voices"][:1])
    return {
        name: {"score": value, "n": len(tests.get(name, tests["new_voices"]).texts)} for name, value in rates.items()
    }


def rate(right: Sequence[str], said: Sequence[str]) -> float:
    """Return the word error rate: substitutions, deletions and insertions over the words that were said."""
    return float(jiwer.wer(list(right), list(said)))
