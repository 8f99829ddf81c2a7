"""Stages whose adapters alone learn, as whole small runs: what moves, what a checkpoint holds, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import CPU, change, run_training, steps, weights_and_state, whole_run
from tiny_models import random_tokens

from moe_gpt.api.saving import save
from moe_gpt.commands.export import ExportOptions, export
from moe_gpt.commands.next_command import command_line
from moe_gpt.config import RunConfig
from moe_gpt.errors import InputError
from moe_gpt.interop import hugging_face
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.post_training.peft_folder import load_adapters
from moe_gpt.post_training.reward_model import load_reward_model
from moe_gpt.post_training.rollout import sample
from moe_gpt.post_training.stages import stage_of
from moe_gpt.training.adapters import LowRank, adapters_of
from moe_gpt.training.saving.checkpoint import load_training_state
from moe_gpt.training.saving.initial_weights import open_initial_weights
from moe_gpt.training.saving.saved_model import load_model, resolve_checkpoint
from moe_gpt.training.saving.size import checkpoint_bytes
from moe_gpt.training.setup import Run, set_up_run
from moe_gpt.training.stage import Start
from moe_gpt.training.summary import describe_run

ADAPTERS = {"rank": 2, "alpha": 8.0}
MARKS = {"also_train": ["^embedding", "^output"]}
TOKENS = random_tokens(2, 9)
STAGES = {
    "sft": {"row_tokens": 64, "sources": [{"name": "own"}]},
    "reward": {"pairs": {}},
    "dpo": {"pairs": {}},
    "rl": {"prompts": {}, "rewards": [{"rule": "right_answer"}], "samples": 2, "max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def base_run(small_values) -> Path:
    """The folder of a finished base run."""
    return whole_run(RunConfig.from_mapping(small_values))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Rows that every stage can read its part of."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    talks = [[{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": "b c d"}] for n in range(8)]
    pairs = [{"prompt": f"a{n}", "chosen": "b", "rejected": "c", "answer": "b"} for n in range(8)]
    path.write_text("".join(json.dumps({"messages": t, **p}) + "\n" for t, p in zip(talks, pairs, strict=True)))
    return path


@pytest.fixture(scope="module")
def make(small_values, rows):
    """Make a config of 4 steps of 4 rows."""

    def config_of(stage: str = "sft", adapters: dict | None = None, **settings) -> RunConfig:
        section = {key: [{**v[0], "files": str(rows)}] if key == "sources" else v for key, v in STAGES[stage].items()}
        section = {key: {"files": str(rows)} if v == {} else v for key, v in section.items()} | settings
        return RunConfig.from_mapping(
            {key: small_values[key] for key in ("train", "checkpoint")}
            | {
                "data": {"cache_dir": small_values["data"]["cache_dir"]},
                "schedule": {"stages": [{"until_tokens": 1024, "seq_len": 64, "batch_tokens": 256}]},
                "optimizer": {"lr": 1e-2},
                "adapters": ADAPTERS | (adapters or {}),
                stage: section,
            }
        )

    return config_of


@pytest.fixture(scope="module")
def chat_run(make, base_run, tmp_path_factory) -> Path:
    """The folder of a run with a chat template, made with adapters and with rows for the marks."""
    return trained(make(adapters=MARKS), tmp_path_factory.mktemp("chat") / "chat", base_run)[1]


@pytest.fixture(scope="module")
def second(make, chat_run, tmp_path_factory) -> tuple[Run, Path]:
    """A stage after it, in which adapters alone learned, and its folder."""
    return trained(make(), tmp_path_factory.mktemp("second") / "second", chat_run)


def trained(config: RunConfig, run_dir: Path, init_from: Path, **options) -> tuple[Run, Path]:
    """Train in a folder; return the run and its folder."""
    return run_training(config, run_dir, init_from=str(init_from), stage=stage_of(config), **options)[0], run_dir


def set_up(config: RunConfig, run_dir: Path, init_from: Path, said: list[str] | None = None) -> Run:
    """Return a run that can start."""
    say = (said if said is not None else []).append
    return set_up_run(config, run_dir, CPU, init_from=str(init_from), say=say, stage=stage_of(config))


@torch.no_grad()
def logits(model: MoEGPT) -> torch.Tensor:
    """Return what a model computes."""
    return model.eval()(TOKENS).logits


def start_of(run: Run) -> MoEGPT:
    """Return the model that a run began with."""
    initial = open_initial_weights(run.identity.initialised_from, None)
    model = MoEGPT(initial.model)
    initial.copy_into(model)
    return model


def test_adapters_learn_and_nothing_else(second):
    """W keeps its bits, A and B move, and the optimizer has state for them alone."""
    run, folder = second
    losses = [line["ce_loss"] for line in steps(folder)]
    assert losses[-1] < losses[0]
    before = dict(start_of(run).named_parameters())
    adapters = adapters_of(run.state.model)
    assert len(adapters) == 8
    for name, parameter in run.state.model.named_parameters():
        plain = name.replace(".parametrizations.", ".").removesuffix(".original")
        assert parameter.requires_grad == (plain not in before)
        if plain in before:
            assert parameter.equal(before[plain])
    assert all(adapter.b.abs().max() > 0 for adapter in adapters.values())
    moving = [p for p in run.state.model.parameters() if p.requires_grad]
    assert set(map(id, run.state.optimizer.state)) == set(map(id, moving))
    assert sum(len(group["params"]) for group in run.state.optimizer.param_groups) == len(moving) == 16


def test_a_checkpoint_is_of_an_ordinary_model(second):
    """Its numbers are those that the adapted model acts as, bit for bit; what it takes on disk is said before."""
    run, folder = second
    loaded = load_model(folder)
    assert not adapters_of(loaded.model)
    assert logits(loaded.model).equal(logits(run.state.model))
    assert not logits(loaded.model).equal(logits(start_of(run)))
    path, said = resolve_checkpoint(folder), checkpoint_bytes(run.config)
    assert (path / "model.safetensors").stat().st_size == said.model
    assert (path / "optimizer.safetensors").stat().st_size == said.optimizer
    assert {name for name in load_file(path / "model.safetensors") if "parametrizations" in name} == set()
    model = run.state.model
    n_learning, n_all = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (1, 0))
    assert f"{n_learning:,} parameters learn, {n_learning:,} of them in adapters" in describe_run(run)
    assert f"model      {n_all - n_learning:,} parameters" in describe_run(run)


def test_what_is_also_trained_learns_in_full(make, base_run, chat_run):
    """The rows of the marks have moved, and so have the others of these matrices; norms and routers have not."""
    before, after = (load_model(path).model.state_dict() for path in (base_run, chat_run))
    moved = {name for name, tensor in before.items() if not tensor.equal(after[name][: len(tensor)])}
    adapted = {name for name in before if ".attention." in name or ".experts." in name}
    assert moved == adapted | {"embedding.weight", "output.weight"}


def test_marks_that_cannot_learn_are_said(make, base_run, chat_run, tmp_path):
    """Where the vocabulary grows and no pattern names its rows."""
    for adapters, init_from, n in (({}, base_run, 1), (MARKS, base_run, 0), ({}, chat_run, 0)):
        set_up(make(adapters=adapters), tmp_path / "run", init_from, said := [])
        assert sum("rows for the tokens of conversations" in text for text in said) == n


def test_a_resumed_run_ends_with_the_same_bytes(make, chat_run, second, tmp_path):
    """Stopped after two of four steps, with moments for what learns alone."""
    parts = trained(make(), tmp_path / "parts", chat_run, max_steps=2)[1]
    trained(make(), parts, chat_run, resume=True)
    assert weights_and_state(parts) == weights_and_state(second[1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "dpo", "rl", "sft"])
def test_a_resumed_stage_of_any_kind_ends_with_the_same_bytes(make, chat_run, tmp_path, stage):
    """With Muon, too."""
    config = change(make(stage), "optimizer", name="muon")
    whole = trained(config, tmp_path / "whole", chat_run)[1]
    parts = trained(config, tmp_path / "parts", chat_run, max_steps=2)[1]
    trained(config, parts, chat_run, resume=True)
    assert weights_and_state(parts) == weights_and_state(whole)


@pytest.mark.parametrize("adapters", [{"rank": 3}, {"alpha": 9.0}, {"targets": ["attention.*"]}])
def test_other_adapters_stop_a_resume(make, second, adapters):
    """No permission changes what the saved factors are."""
    config = make(adapters=adapters)
    with pytest.raises(InputError, match=r"adapters\.\S+ cannot change within a run"):
        run_training(config, second[1], stage=stage_of(config), resume=True, allow_changes=["adapters"])


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        pytest.param("dpo", {}, marks=pytest.mark.slow),
        pytest.param("rl", {}, marks=pytest.mark.slow),
        ("rl", {"algorithm": "ppo"}),
    ],
)
def test_stages_of_preferences_and_rewards(make, chat_run, tmp_path, stage, settings):
    """Adapters move the policy; a value model beside it, which is new, learns in full."""
    run, folder = trained(make(stage, **settings), tmp_path / "run", chat_run, max_steps=2)
    learning = {name for name, p in run.state.model.named_parameters() if p.requires_grad}
    values = {name for name, _ in run.state.model.named_parameters() if name.startswith("value.")}
    assert bool(values) == bool(settings)
    assert {name for name in learning if name not in values} == {
        f"{place}.{letter}"
        for place, module in run.state.model.named_modules()
        if isinstance(module, LowRank)
        for letter in "ab"
    }
    assert learning >= values
    assert logits(load_model(folder).model).equal(logits(run.state.model))


def test_a_reward_model_has_a_head_that_learns(make, chat_run, tmp_path):
    """The head is new; the run can go back to a checkpoint, and others can read it."""
    run, folder = trained(make("reward"), tmp_path / "run", chat_run, max_steps=1)
    learning = {name for name, p in run.state.model.named_parameters() if p.requires_grad}
    assert {name for name in learning if "parametrizations" not in name} == {"output.weight"}
    assert logits(load_reward_model(folder)).equal(expected := logits(run.state.model))
    for parameter in run.state.model.parameters():
        parameter.data.zero_()
    load_training_state(run.state, resolve_checkpoint(folder))
    assert logits(run.state.model).equal(expected)


def test_the_next_stage_starts_merged(make, second, tmp_path):
    """Its adapters are new, and its first forward pass is the last one of the stage before."""
    run = set_up(make(), tmp_path / "run", second[1])
    assert logits(run.state.model).equal(logits(load_model(second[1]).model))
    assert all(adapter.b.abs().max() == 0 for adapter in adapters_of(run.state.model).values())


def test_exports_are_merged(second, tmp_path):
    """By the command and in Python, where the run stays as it was."""
    run, folder = second
    export(str(folder), tmp_path / "command")
    save(run, tmp_path / "python")
    for written in ("command", "python"):
        assert logits(hugging_face.load(tmp_path / written)).equal(logits(run.state.model))
    assert adapters_of(run.state.model)


def test_adapters_are_exported_alone(chat_run, second, tmp_path, capsys):
    """On top of the base they make the run's model, and the next command exports that base."""
    export(str(second[1]), tmp_path / "folder", options=ExportOptions(adapters=True))
    assert command_line("export", resolve_checkpoint(chat_run), "BASE") in capsys.readouterr().out
    model = load_model(chat_run).model
    load_adapters(model, tmp_path / "folder")
    assert logits(model).equal(logits(load_model(second[1]).model))


def test_what_adapters_alone_would_lack_is_not_exported(make, base_run, chat_run, tmp_path):
    """The way out is the merged export."""
    grown = trained(make(), tmp_path / "grown", base_run, max_steps=1)[1]
    for run, cause in (
        (base_run, "has no adapters"),
        (
            chat_run,
            r"learned more than its adapters: \^embedding, \^output, rows of new special tokens; leave --adapters out",
        ),
        (grown, "learned more than its adapters: rows of new special tokens"),
    ):
        with pytest.raises(InputError, match=cause):
            export(str(run), tmp_path / "folder", options=ExportOptions(adapters=True))
    with pytest.raises(InputError, match="leave them out with --adapters"):
        export(str(base_run), tmp_path / "folder", options=ExportOptions(adapters=True, dtype="bfloat16"))
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("adapters", "cause"),
    [
        ({"targets": ["attention.*", "q_proj"]}, r"adapters\.targets .*q_proj.*there are attention\.out"),
        ({"also_train": ["heads"]}, r"adapters\.also_train: 'heads' matches no parameter; names are embedding\.weight"),
        ({"also_train": ["attention.out"]}, r"adapters\.also_train: 'attention.out' matches no parameter"),
    ],
)
def test_patterns_that_match_nothing_are_errors(make, chat_run, tmp_path, adapters, cause):
    """What has an adapter does not learn in full too."""
    with pytest.raises(InputError, match=cause):
        set_up(make(adapters=adapters), tmp_path / "run", chat_run)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused_before_data_is_prepared(make, chat_run, tmp_path, monkeypatch):
    """In one line."""
    run = set_up(make(), tmp_path / "run", chat_run)
    monkeypatch.setenv("RANK", "0")
    for name, value in {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="^adapters learn in one process, got 2; start it without torchrun$"):
        run.stage.settle(run.config, Start(initial=open_initial_weights(chat_run, None)), print)


def test_decoding_computes_adapted_weights_once(make, chat_run, tmp_path, monkeypatch):
    """Not once for each token; a later call sees what has moved."""
    model, calls = set_up(make(), tmp_path / "run", chat_run).state.model, []
    forward = LowRank.forward
    monkeypatch.setattr(LowRank, "forward", lambda self, weight: calls.append(1) or forward(self, weight))
    sample(model, [[1, 2, 3]], 2, 5, [0], seed=0, step=0)
    assert len(calls) == len(adapters_of(model)) == 8
    before = logits(model)
    for adapter in adapters_of(model).values():
        torch.nn.init.normal_(adapter.b)
    assert not logits(model).equal(before)
