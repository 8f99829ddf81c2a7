"""``generate``, ``chat`` and ``export`` of a run that sees, as the command line calls them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from made_up_checkpoint import make_run, save_checkpoint
from PIL import Image
from run_scripts import command
from tiny_seeing import SEE, noise, save_seeing_run
from torch.nn.functional import pad

import moe_gpt
from moe_gpt.errors import InputError
from moe_gpt.post_training.chat import SPECIAL_TOKENS
from moe_gpt.report.routed_text import show_controls

LONG = ("--temperature", 1, "--max-new-tokens", 20)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A mixture without turns, one that chats, a dense one, and one of text alone."""
    folder = tmp_path_factory.mktemp("runs")
    save_checkpoint(folder / "text", *make_run())
    return {
        "base": save_seeing_run(folder / "base"),
        "chat": save_seeing_run(folder / "chat", SPECIAL_TOKENS),
        "dense": save_seeing_run(folder / "dense", n_experts=1, top_k=1),
        "text": folder / "text",
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Two files."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in (1, 2):
        Image.fromarray(noise(seed).permute(1, 2, 0).numpy()).save(folder / f"{seed}.png")
    Image.new("RGB", (9, 9), "white").save(folder / "white.png")
    return [folder / "1.png", folder / "white.png"]


def test_text_has_the_context_of_the_text_model(runs):
    """Rows with pictures are short, and say nothing of how long a text the model knows."""
    loaded = moe_gpt.load(runs["base"])
    assert loaded.trained_length is None
    assert loaded.context == loaded.model.config.max_seq_len


def talk(run: Path, typed: str, *options: object) -> tuple[str, str]:
    """What a conversation prints, and says on stderr."""
    with mock.patch.object(sys, "stdin", io.StringIO(typed)):
        done = command("chat", run, "--max-new-tokens", 8, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_generate_shows_pictures_at_their_markers(runs, pictures):
    """As Python does; every sample sees them; without a picture it is the run's text model."""
    loaded, (first, second) = moe_gpt.load(runs["base"]), map(str, pictures)
    prompt, kept = "the <image>fox <image>", {"temperature": 1, "max_new_tokens": 20}
    done = command("generate", runs["base"], "--prompt", prompt, "--image", first, "--image", second, *LONG)
    assert done.stdout == prompt + loaded.generate(prompt, images=[first, second], **kept) + "\n"
    swapped = command("generate", runs["base"], "--prompt", prompt, "--image", second, "--image", first, *LONG)
    assert swapped.stdout != done.stdout
    blind = command("generate", runs["base"], "--prompt", prompt, *LONG)
    assert blind.stdout == prompt + loaded.generate(prompt, **kept) + "\n"
    guessing = command(
        "generate", runs["base"], "--prompt", prompt, "--image", first, "--image", second, *LONG, "--lookup"
    )
    assert guessing.stdout == done.stdout


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_chat_shows_pictures_with_a_question(kind, runs, pictures):
    """With --message, and with /image in a conversation; the next question still sees it, and /reset forgets it."""
    first, second = pictures
    loaded = moe_gpt.load(runs[kind])
    asked = [{"role": "user", "content": [{"type": "image", "image": str(first)}, {"type": "text", "text": "fox"}]}]
    expected = loaded.chat(asked, max_new_tokens=8)
    done = command("chat", runs[kind], "--image", first, "--message", "fox", "--max-new-tokens", 8)
    assert done.stdout == show_controls(expected) + "\n"
    both = asked + [{"role": "assistant", "content": expected}, {"role": "user", "content": "dog"}]
    out, err = talk(runs[kind], f"/image {first}\nfox\ndog\n/reset\nfox\n/image {second}\n<image>fox<image>\n")
    alone = loaded.chat([{"role": "user", "content": "fox"}], max_new_tokens=8)
    assert out == "\n".join([*map(show_controls, [expected, loaded.chat(both, max_new_tokens=8), alone]), ""])
    assert "the text has <image> 2 times, the number of pictures is 1" in err


def test_what_cannot_be_shown_is_one_line(runs, pictures, tmp_path):
    """With status 2: a run of text, a missing file, a folder, other numbers of markers, an address."""
    first = pictures[0]
    for words, message in {
        (
            "generate",
            runs["text"],
            "--prompt",
            "x",
            "--image",
            first,
        ): "sees no pictures; leave them out, or give it eyes",
        ("chat", runs["text"], "--message", "x", "--image", first): "sees no pictures",
        ("generate", runs["base"], "--prompt", "x", "--image", "nosuch.png"): "nosuch.png is not there",
        ("generate", runs["base"], "--prompt", "x", "--image", tmp_path): f"{tmp_path} is no file",
        ("generate", runs["base"], "--prompt", "x", "--image", "https://a.b/c"): "is not fetched",
        ("generate", runs["base"], "--prompt", "<image>x<image>", "--image", first): "<image> 2 times, the number",
    }.items():
        done = command(*words)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "nosuch.png is not there" in talk(runs["base"], "/image nosuch.png\n")[1]


def test_a_typed_path_may_have_quotes_blanks_and_a_home(runs, pictures, tmp_path, monkeypatch):
    """As in a shell, and blanks without quotes, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").write_bytes(pictures[0].read_bytes())
    forms = [f'"{tmp_path}/a b.png"', f"'{tmp_path}/a b.png'", f"{tmp_path}/a b.png", "~/a b.png", '"~/a b.png"']
    err = talk(runs["base"], "".join(f"/image {form}\n" for form in forms))[1]
    assert err.count("it is shown with your next question") == 5


@torch.no_grad()
def test_a_dense_run_is_exported_as_mllama(runs, pictures, tmp_path):
    """By the command, which says what differs, and by ``moe_gpt.save``; both load and compute the same."""
    done = command("export", runs["dense"], tmp_path / "x", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert "MllamaForCausalLM, float32" in done.stdout
    for note in ("the encoder is not in the folder", "tokens before the first picture", "hidden_size is 64, not 32"):
        assert note in " ".join(done.stdout.split())
    loaded = moe_gpt.load(runs["dense"])
    moe_gpt.save(loaded, tmp_path / "y")
    card = (tmp_path / "x" / "README.md").read_text()
    assert "(0, 64 - features.shape[-1])" in card
    features = loaded.features(pictures[:1])
    ids, _ = loaded.look("the fox", pictures[:1])
    tokens, states = torch.tensor([ids]), pad(features, (0, 64 - features.shape[-1]))
    with loaded.model.looking(loaded.model.seen(features, [1], torch.ones_like(tokens))):
        right = loaded.model(tokens).logits
    sees = torch.zeros(1, 1, 1, states.shape[1])
    for name in "xy":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        logits = theirs(tokens, cross_attention_states=states, cross_attention_mask=sees, use_cache=False).logits
        torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)


def test_other_exports_are_refused_in_a_line(runs, tmp_path):
    """A mixture, quantised weights; the folder of Mllama is not one that moe_gpt reads."""
    done = command("export", runs["base"], tmp_path / "x")
    assert done.returncode == 2
    assert "is a mixture that sees, and cannot be exported" in done.stderr
    assert "it is saved in the format of moe_gpt" in done.stderr
    done = command("export", runs["dense"], tmp_path / "x", "--quantize", "int8")
    assert (done.returncode, "no place for the encoder" in done.stderr) == (2, True)
    assert not (tmp_path / "x").exists()
    command("export", runs["dense"], tmp_path / "y")
    with pytest.raises(InputError, match="MllamaForCausalLM"):
        moe_gpt.load(tmp_path / "y")
    assert SEE.width == 16
