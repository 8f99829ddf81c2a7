"""A text model that learns to see: what stays, what learns, and what a run can be used for, with whole small runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from PIL import Image
from run_scripts import command, kill_after
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import CPU, run_training, steps, weights_and_state, whole_run
from tiny_models import random_tokens, tiny_model

from moe_gpt.config import OptimizerConfig, RunConfig
from moe_gpt.config.vision import PictureSourceConfig, SeeConfig
from moe_gpt.errors import ConfigError, InputError
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.post_training import seeing_scores
from moe_gpt.post_training.scores import format_scores
from moe_gpt.post_training.seeing import load_seeing_model
from moe_gpt.post_training.seeing_scores import LOOKS, answer, picture_answers, score_pictures, write_looks
from moe_gpt.post_training.showing import answer_loss, batch_of
from moe_gpt.post_training.stages import stage_of, write_findings
from moe_gpt.training.optimizer import build_optimizer
from moe_gpt.training.saving.saved_model import load_model, resolve_checkpoint
from moe_gpt.training.setup import Run, set_up_run
from moe_gpt.training.step import update_weights
from moe_gpt.vision.examples import TASKS
from moe_gpt.vision.pictured_text import PicturedText, Row
from moe_gpt.vision.seeing import OWN, SeeingModel, seeing_class

SCENES = (PictureSourceConfig(builtin="scenes"),)


@pytest.fixture(scope="module")
def base_run(small_values) -> Path:
    """The folder of a finished base run."""
    return whole_run(RunConfig.from_mapping(small_values))


@pytest.fixture(scope="module")
def values(small_values) -> dict:
    """Plain values of the stage: 6 steps of 4 rows, with weight decay, which must not reach the text model."""
    return {key: small_values[key] for key in ("train", "checkpoint")} | {
        "data": {"cache_dir": small_values["data"]["cache_dir"]},
        "schedule": {"stages": [{"until_tokens": 1536, "seq_len": 64, "batch_tokens": 256}]},
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "see": {"size": 16, "width": 16, "sources": [{"files": "rows.jsonl"}]},
    }


@pytest.fixture
def rows(tmp_path) -> Path:
    """Rows on pictures of one colour each."""
    lines = []
    for number in range(24):
        shade = 10 * number
        Image.new("RGB", (20, 16), (shade, 255 - shade, 99)).save(tmp_path / f"{number}.png")
        pictures = [f"{number}.png", f"{number // 2}.png"][: 1 + number % 2]
        lines.append({"images": pictures, "prompt": "What is it?", "text": f" {number // 20}"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(values: dict, rows: Path, **changes) -> RunConfig:
    """The stage on the rows of a file."""
    see = values["see"] | {"sources": [{"files": str(rows)}]} | changes
    return RunConfig.from_mapping(values | {"see": see})


def trained(config: RunConfig, run_dir: Path, base_run: Path, **options) -> Run:
    """Train in a folder."""
    return run_training(config, run_dir, init_from=str(base_run), stage=stage_of(config), **options)[0]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint."""
    return load_file(resolve_checkpoint(run_dir) / "model.safetensors")


def opened(model: SeeingModel) -> SeeingModel:
    """The model after some training: its gates are open."""
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return model.eval()


def seeing(**changes) -> SeeingModel:
    """A tiny model that sees."""
    kind = seeing_class(SeeConfig(**({"sources": SCENES, "size": 16, "width": 16} | changes)))
    return opened(kind.from_model(tiny_model()))


@dataclasses.dataclass(frozen=True)
class Noise:
    """A picture of noise."""

    seed: int

    def pixels(self, size: int) -> torch.Tensor:
        """Draw it."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)


def row(length: int, places: list[int], seeds: list[int], n_learnt: int = 2) -> Row:
    """A row of random tokens with pictures."""
    ids = random_tokens(length, seed=length).tolist()
    is_answer = [False] * (length - n_learnt) + [True] * n_learnt
    return Row(PicturedText(ids, is_answer, places, [Noise(seed) for seed in seeds]), "")


def test_the_text_model_stays_bit_for_bit(values, base_run, rows, tmp_path):
    """Weights, logits and files, after steps with weight decay; what is new moves, and the loss falls."""
    longer = values | {"schedule": {"stages": [{"until_tokens": 6144, "seq_len": 64, "batch_tokens": 256}]}}
    run = trained(config_of(longer, rows), tmp_path / "run", base_run)
    losses = [line["ce_loss"] for line in steps(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5
    before, after = weights(base_run), weights(tmp_path / "run")
    assert {name for name in after if not name.startswith(OWN)} == before.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert all(after[name].any() for name in after if name.endswith("_gate"))
    text, model = load_model(base_run).model, load_seeing_model(tmp_path / "run").model
    tokens = torch.tensor([run.data.tokenizer.encode("def a(b): return b")])
    with torch.no_grad():
        assert model(tokens).logits.equal(text(tokens).logits)
        assert load_model(tmp_path / "run").model(tokens).logits.equal(text(tokens).logits)
    assert type(load_model(tmp_path / "run").model) is MoEGPT
    said, more = list[str](), config_of(values, rows)
    started = {"init_from": str(tmp_path / "run"), "say": said.append, "stage": stage_of(more)}
    again = set_up_run(more, tmp_path / "more", CPU, **started)
    assert again.state.model.embedding.weight.equal(before["embedding.weight"])
    assert any("stays behind" in text for text in said)
    for name, tensor in run.state.model.state_dict().items():
        assert model.state_dict()[name].equal(tensor), name


@dataclasses.dataclass(frozen=True)
class Shade:
    """A picture of a shade of red or blue."""

    number: int

    def pixels(self, size: int) -> torch.Tensor:
        """Draw it."""
        colour = (200, 30, self.number) if self.number % 2 else (self.number, 30, 200)
        return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, size, size)


@pytest.mark.slow
def test_colours_are_learnt_and_new_shades_answered():
    """By what is new alone; with the pictures changed, the answers change."""
    kind = seeing_class(SeeConfig(sources=SCENES, size=16, width=16))
    model = kind.from_model(tiny_model()).eval()

    def row_on(number: int) -> Row:
        ids = [1, 2, 3, 4 + number % 2, 6]
        return Row(PicturedText(ids, [False] * 3 + [True, True], [0], [Shade(number)]), "")

    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.0))
    for step in range(40):
        loss = answer_loss(model, batch_of([row_on((8 * step + k) * 5 % 100) for k in range(8)], model)) / 8
        loss.backward()
        update_weights(model, optimizer, 1e-2, 1.0, loss.detach())
    new = [row_on(number) for number in range(101, 117)]
    changed = [row._replace(text=row.text._replace(pictures=[Shade(n + 1)])) for n, row in enumerate(new, 101)]
    with torch.no_grad():
        for rows, right in ((new, 1.0), (changed, 0.0)):
            batch = batch_of(rows, model)
            with model.looking(batch.seen):
                said = model(batch.tokens).logits[:, -3].argmax(-1)
            assert (said == batch.tokens[:, -2]).float().mean() == right
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    run, chances = SimpleNamespace(data=SimpleNamespace(tokenizer=tokenizer), precision="fp32"), [0.25, 0.75, None, 1.0]
    questions = [seeing_scores._Question(row, chances[n % 4]) for n, row in enumerate(new)]
    score = seeing_scores._score(run, model, questions, {(1, 2, 3): (5,)})
    assert (score.score, score.n, score.blind) == (1, 16, 0.5)
    assert score.shuffled == 0, "each question has the picture of the next one, of the other colour"
    assert score.random_object == pytest.approx(2 / 3)


def test_tasks_that_were_not_run_have_no_numbers(monkeypatch):
    """They are in scores.json, and not in the table for people."""
    score = seeing_scores.PictureScore(0.5, 200, 0.1, 0.2, 0.3, None)
    monkeypatch.setattr(seeing_scores, "_questions", lambda run: {"count": []})
    monkeypatch.setattr(seeing_scores, "_score", lambda *arguments: score)
    monkeypatch.setattr(seeing_scores, "_known_rows", lambda run: [])
    model = seeing_class(SeeConfig(sources=SCENES, size=16, width=16)).from_model(tiny_model())
    torch.nn.init.ones_(model.cross.layers[0].attention_gate)
    run = SimpleNamespace(config=SimpleNamespace(see=SeeConfig(sources=SCENES)), device=torch.device("cpu"))
    found = seeing_scores.score_pictures(run, model)
    assert {*found} == {*TASKS} >= {"caption_seen", "caption_held_out", "count", "second_picture", "digits"}
    assert found["count"] == score
    assert {*found["digits"]} == {None, 0}
    text = format_scores({"stage": "see", "after": {task: each._asdict() for task, each in found.items()}})
    assert "count" in text
    assert "digits" not in text


def test_a_resumed_run_ends_with_the_same_bytes(values, base_run, rows, tmp_path):
    """Interrupted between two steps, with the pictures of files."""
    config = config_of(values, rows)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    trained(config, whole, base_run)
    trained(config, pieces, base_run, max_steps=2)
    run_training(config, pieces, resume=True, stage=stage_of(config))
    assert weights_and_state(whole) == weights_and_state(pieces)


def test_a_resumed_run_refuses_other_pictures(values, base_run, rows, tmp_path):
    """Of the same name and the same number of bytes."""
    config = config_of(values, rows)
    trained(config, tmp_path / "run", base_run, max_steps=2)
    picture = tmp_path / "3.png"
    picture.write_bytes(picture.read_bytes()[:-1] + b"!")  # of the last checksum, which nobody reads
    with pytest.raises(InputError, match=r"data\.pictures was 'pictures with digest"):
        run_training(config, tmp_path / "run", resume=True, stage=stage_of(config))


def test_a_damaged_picture_ends_the_run_before_its_first_step(values, base_run, rows, tmp_path):
    """With file, row and cause, whichever it is."""
    picture = sorted(tmp_path.glob("*.png"))[-1]
    picture.write_bytes(picture.read_bytes()[:-30])
    cause = rf"rows\.jsonl row \d+: images\.\d: .*{picture.name} cannot be read as a picture"
    with pytest.raises(InputError, match=cause):
        trained(config_of(values, rows), tmp_path / "run", base_run)
    assert not list((tmp_path / "run").glob("metrics*")), "no step was taken"


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(values, base_run, rows, tmp_path):
    """Killed while it runs, after its second checkpoint."""
    see = values["see"] | {"sources": [{"files": str(rows)}]}
    stages = [{"until_tokens": 15_360, "seq_len": 64, "batch_tokens": 256}]
    longer = values | {"see": see, "checkpoint": {"every_steps": 3, "keep_last": 99}, "schedule": {"stages": stages}}
    (tmp_path / "sees.yaml").write_text(yaml.safe_dump(longer))
    words = tmp_path / "sees.yaml", "--init-from", base_run
    kill_after(2, tmp_path / "killed", "finetune", *words)
    for last in (["--run-dir", tmp_path / "killed", "--resume"], [*words[1:], "--run-dir", tmp_path / "whole"]):
        done = command("finetune", words[0], *last)
        assert done.returncode == 0, done.stderr
    assert weights_and_state(tmp_path / "killed") == weights_and_state(tmp_path / "whole")


@torch.no_grad()
def test_a_second_picture_changes_what_follows_it_alone():
    """As do all pictures: tokens before the first one are those of text alone."""
    model = seeing()
    logits = []
    for seeds in ([1, 2], [1, 3]):
        batch = batch_of([row(12, [3, 7], seeds)], model)
        with model.looking(batch.seen):
            logits.append(model(batch.tokens).logits[0])
    alone = model(batch.tokens).logits[0]
    torch.testing.assert_close(logits[0][:3], alone[:3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[0][:7], logits[1][:7], atol=1e-5, rtol=1e-5)
    assert (logits[0][3:7] - alone[3:7]).abs().amax(1).min() > 0.01
    assert (logits[0][7:] - logits[1][7:]).abs().amax(1).min() > 0.01


def test_rows_together_learn_what_they_learn_alone():
    """Whatever their lengths and numbers of pictures; answers alone have a loss."""
    model, rows = seeing(), [row(12, [3, 7], [1, 2]), row(9, [0], [3], 3), row(5, [1], [4])]
    together = answer_loss(model, batch_of(rows, model))
    alone = [answer_loss(model, batch_of([each], model)) for each in rows]
    torch.testing.assert_close(together, torch.stack(alone).sum(), atol=1e-4, rtol=1e-5)
    batch = batch_of(rows[1:2], model)
    with model.looking(batch.seen):
        found = model(batch.tokens).logits[0].log_softmax(-1)
    right = -sum(found[at - 1, batch.tokens[0, at]] for at in range(6, 9))
    torch.testing.assert_close(alone[1], right, atol=1e-4, rtol=1e-5)


def test_a_blind_model_sees_grey():
    """Other pictures change nothing."""
    rows = [row(9, [2], [seed]) for seed in (1, 2)]
    losses = [answer_loss(model, batch_of([each], model)) for model in (seeing(blind=True),) for each in rows]
    assert losses[0].equal(losses[1])
    torch.manual_seed(0)
    model = seeing()
    assert not answer_loss(model, batch_of(rows[:1], model)).equal(answer_loss(model, batch_of(rows[1:], model)))


def test_low_precision_reaches_no_token_id():
    """Ids above 256, which bfloat16 cannot count, give nearly the loss of float32."""
    kind = seeing_class(SeeConfig(sources=SCENES, size=16, width=16))
    model = opened(kind.from_model(tiny_model(vocab_size=2000)))
    big = row(12, [3], [1])
    big = big._replace(text=big.text._replace(ids=[token + 1900 for token in big.text.ids]))
    exact = answer_loss(model, batch_of([big], model)).item()
    with torch.autocast("cpu", torch.bfloat16):
        batch = batch_of([big], model)
        rough = answer_loss(model, batch).item()
    assert batch.tokens.dtype == batch.seen.sees.dtype == torch.long
    assert rough == pytest.approx(exact, abs=0.1)


def test_gates_learn_faster_and_the_text_not_at_all():
    """The optimizer has the new parameters alone."""
    model = seeing(gate_lr_scale=7)
    groups = build_optimizer(model, RunConfig().optimizer).param_groups
    rates = {id(parameter): group["scales"].lr for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates.get(id(parameter)) == (7 if name.endswith("_gate") else 1 if name.startswith(OWN) else None), name


@torch.no_grad()
def test_decoding_answers_as_reading_does():
    """Rows of several lengths, padded on the left, with a cache: each token is the likeliest after those before."""
    model = seeing()
    rows = [row(12, [3, 7], [1, 2]), row(9, [0, 1], [3, 4])]

    class Spelled:
        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    for shift in (0, 1):
        for number, said in enumerate(answer(model, rows, Spelled(), "fp32", shift)):  # type: ignore[arg-type]
            text = rows[number].text
            ids = text.ids[: rows[number].start]
            pictures = rows[(number + shift) % 2].text.pictures
            for token in map(int, said.split()):
                ids = [*ids, token]
                whole = Row(PicturedText(ids, [True] * len(ids), text.places, pictures), "")
                batch = batch_of([whole], model)
                with model.looking(batch.seen):
                    assert model(batch.tokens).logits[0, -2].argmax() == token
            assert said


def test_scores_stand_beside_those_without_pictures(values, base_run, rows, tmp_path):
    """Of held-out rows of files; a model with closed gates has none, because it is the text model."""
    config = config_of(values, rows)
    run = set_up_run(config, tmp_path / "run", CPU, init_from=str(base_run), say=str, stage=stage_of(config))
    assert score_pictures(run, run.state.model) == {}
    opened(run.state.model)
    (score,) = score_pictures(run, run.state.model).values()
    assert score.n == len(run.material.held_out) > 0
    assert score.blind == 1  # the usual answer is right
    assert score.random_object is None
    assert {each["prompt"] for each in picture_answers(run, run.state.model, 8)} <= {
        "<image>What is it?",
        "<image><image>What is it?",
    }
    (tmp_path / "run").mkdir()
    write_looks(run, run.state.model)
    with safe_open(tmp_path / "run" / LOOKS, "np") as file:
        words, weights = json.loads(file.metadata()["0"]), file.get_tensor("0/weights")
    assert weights.shape == (len(words), 2, 2)
    assert weights.sum((1, 2)) == pytest.approx(1, abs=1e-5)
    written = write_findings(run, run.state.model, "after")
    assert written["after"]["held_out_rows"].keys() == {*score._fields}


def test_a_vision_models_folder_stays_out_of_the_checkpoint(values, base_run, rows, tmp_path):
    """It is read again, and another model in its place is refused."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    vision.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    config = config_of(values, rows, encoder=str(tmp_path / "vit"), resampled_rows=3, size=None)
    run = trained(config, tmp_path / "run", base_run)
    assert not any(name.startswith("encoder") for name in weights(tmp_path / "run"))
    assert run.config.see.size == 16  # of the processor
    model = load_seeing_model(tmp_path / "run").model
    pictures = torch.stack([Noise(1).pixels(16)])
    with torch.no_grad():
        assert model.features(pictures).shape == (1, 3, 32)
        assert model.features(pictures).equal(run.state.model.features(pictures))
    torch.nn.init.ones_(vision.layernorm.weight)
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(
        tmp_path / "vit"
    )
    with pytest.raises(InputError, match=r"was trained with another vision model than .*vit has now"):
        load_seeing_model(tmp_path / "run")


def test_what_cannot_be_is_refused_in_a_line(values, base_run, rows, tmp_path, monkeypatch):
    """Settings that would change the text, sizes, a model of text, several processes."""
    for change, cause in (
        ({"adapters": {}}, "adapters and see exclude each other"),
        ({"train": {"train_only": ["embedding"]}}, "train.train_only and see exclude each other"),
        ({"see": {"sources": [{"builtin": "scenes"}], "size": 20}}, "see.size must be a multiple of 8"),
        (
            {"schedule": {"stages": [{"until_tokens": 640 * n, "seq_len": n, "batch_tokens": 64} for n in (32, 64)]}},
            "schedule.stages must have one seq_len in the stage see",
        ),
        ({"see": {"sources": [{}]}}, "see.sources.0.builtin or files: give exactly one"),
    ):
        with pytest.raises(ConfigError, match=cause):
            RunConfig.from_mapping(values | change)
    with pytest.raises(InputError, match="must be of a model that sees"):
        load_seeing_model(base_run)
    config = config_of(values, rows, encoder=str(tmp_path))
    with pytest.raises(InputError, match=r"see\.encoder: .* has no config\.json"):
        trained(config, tmp_path / "run", base_run)
    for name, value in {
        "WORLD_SIZE": 2,
        "RANK": 0,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="the stage see runs in one process, got 2"):
        stage_of(config).prepare(config, stage_start(base_run), str)


def stage_start(base_run: Path):
    """What the stage begins with."""
    from moe_gpt.training.setup import find_start

    config = RunConfig()
    return find_start(config, Path("nowhere"), str(base_run), str)
