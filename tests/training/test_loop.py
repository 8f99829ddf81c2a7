"""Whole small runs in this process: what is written, where they stop, and that resuming changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal

import pytest
import torch
from small_runs import CPU, Silent, change, run_training, steps, weights_and_state, whole_run

from moe_gpt.config import RunConfig
from moe_gpt.data.stream import validation_rows
from moe_gpt.distributed.layout import Layout
from moe_gpt.distributed.process import SOLO
from moe_gpt.errors import InputError
from moe_gpt.training import fits, setup
from moe_gpt.training.loop import Limits, pretraining_step, train
from moe_gpt.training.records.metrics import read_metrics
from moe_gpt.training.saving.listing import list_checkpoints
from moe_gpt.training.saving.run_folder import open_run_folder
from moe_gpt.training.saving.saved_model import load_model
from moe_gpt.training.setup import set_up_run
from moe_gpt.training.signals import stop_signals
from moe_gpt.training.stage import build_evaluator


def step_lines(run_dir) -> list[dict]:
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "cpu_seconds")} for line in lines]


def test_what_a_step_of_its_own_reports_is_in_the_log(small_config, tmp_path):
    """Keys of the line stay what they are."""

    def take_step(run, plan, should_record):
        return pretraining_step(run, plan, should_record)._replace(extras={"reward": 0.5, "step": -1})

    run_training(small_config, tmp_path, max_steps=2, take_step=take_step)
    assert [(line["step"], line["reward"]) for line in step_lines(tmp_path)] == [(1, 0.5), (2, 0.5)]


def test_run_writes_what_it_promises(small_config, tmp_path):
    """Resolved config, tokenizer, a line per step with every key, evaluations at the start and the end."""
    run, outcome = run_training(small_config, tmp_path)
    assert outcome == "finished"
    lines = read_metrics(tmp_path / "metrics.jsonl")
    steps, evaluations = [x for x in lines if "loss" in x], [x for x in lines if "val/prose/ce_loss" in x]
    assert [line["step"] for line in steps] == list(range(1, run.state.step + 1))
    assert [line["tokens_seen"] for line in evaluations] == [0, 6144]
    keys = "step tokens_seen loss ce_loss load_balancing_loss router_z_loss lr seq_len batch_tokens grad_norm"
    assert set(steps[0]) >= {*keys.split(), "tokens_per_second"}
    assert set(evaluations[0]) >= {f"val/{s}/{m}" for s in ("prose", "code") for m in ("ce_loss", "bits_per_byte")}
    assert RunConfig.from_mapping(json.loads(json.dumps(dataclasses.asdict(run.config)))) == run.config
    assert {"config.yaml", "metrics.jsonl", "tokenizer.json", "checkpoints"} <= {p.name for p in tmp_path.iterdir()}


def test_run_follows_the_curriculum(small_config, tmp_path):
    """Every stage ends on its token count, tokens_seen is the sum of the batches, and seq_len follows the stage."""
    run_training(small_config, tmp_path)
    seen = 0
    for line in step_lines(tmp_path):
        assert line["seq_len"] == (16 if seen < 1024 else 32 if seen < 3072 else 64)
        seen += line["batch_tokens"]
        assert line["tokens_seen"] == seen
    ends = {line["tokens_seen"] for line in step_lines(tmp_path)}
    assert {1024, 3072, 6144} <= ends


def test_run_learns(small_config, tmp_path):
    """Validation loss falls by more than half a nat on both sources."""
    run_training(small_config, tmp_path)
    first, last = (x for x in read_metrics(tmp_path / "metrics.jsonl") if "val/prose/ce_loss" in x)
    for source in ("prose", "code"):
        assert last[f"val/{source}/ce_loss"] < first[f"val/{source}/ce_loss"] - 0.5


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {"balance": "bias", "router_noise": 0.1, "capacity_factor": 1.0}],
)
def test_resume_in_every_stage_is_bit_identical(small_config, tmp_path, settings):
    """Stop in each stage, at a stage's end and with accumulation, resume: same metrics, same final files."""
    config = change(small_config, "model", **settings)
    whole = whole_run(config)
    for stop_at in (3, 8, 12, 18, 22):
        run_training(config, tmp_path / "pieces", resume=True, max_steps=stop_at)
    _, outcome = run_training(config, tmp_path / "pieces", resume=True)
    assert outcome == "finished"
    assert step_lines(tmp_path / "pieces") == step_lines(whole)
    assert weights_and_state(tmp_path / "pieces") == weights_and_state(whole)


@pytest.mark.slow
@pytest.mark.compile
def test_resume_with_compiled_blocks_is_bit_identical(small_config, tmp_path):
    """The compiled run and the compiled pieces, each compiled anew."""
    config = change(small_config, "train", compile=True, precision="bf16")
    run_training(config, tmp_path / "whole")
    for stop_at in (5, 14):
        torch._dynamo.reset()
        run_training(config, tmp_path / "pieces", resume=True, max_steps=stop_at)
    torch._dynamo.reset()
    run_training(config, tmp_path / "pieces", resume=True)
    assert step_lines(tmp_path / "pieces") == step_lines(tmp_path / "whole")
    assert weights_and_state(tmp_path / "pieces") == weights_and_state(tmp_path / "whole")


@pytest.mark.slow
def test_deterministic_runs_are_what_a_cpu_gives_anyway(small_config, tmp_path):
    """The switch is on while such a run trains, refuses what cannot repeat, and changes nothing here."""
    run_training(small_config, tmp_path / "plain", max_steps=4)
    assert not torch.are_deterministic_algorithms_enabled()
    run_training(change(small_config, "train", deterministic=True), tmp_path / "strict", max_steps=4)
    assert torch.are_deterministic_algorithms_enabled()
    run_training(small_config, tmp_path / "again", max_steps=1)
    assert not torch.are_deterministic_algorithms_enabled()
    assert weights_and_state(tmp_path / "plain") == weights_and_state(tmp_path / "strict")


def test_resume_falls_back_from_a_damaged_checkpoint(small_config, tmp_path):
    """It says which file of which checkpoint, goes on from the one before, and ends with the same bytes."""
    config = change(small_config, "checkpoint", every_steps=5)
    whole = whole_run(config)
    run_training(config, tmp_path / "run", max_steps=12)
    newest = list_checkpoints(tmp_path / "run")[-1]
    (newest / "optimizer.safetensors").write_bytes(b"x")
    said: list[str] = []
    run = set_up_run(config, tmp_path / "run", CPU, resume=True, say=said.append)
    assert run.state.step == 10
    assert f"WARNING: checkpoint {newest}: optimizer.safetensors has 1 bytes" in said[0]
    assert said[1].endswith(str(list_checkpoints(tmp_path / "run")[-2]))
    run_training(config, tmp_path / "run", resume=True)
    assert (newest.parent / f"{newest.name}.damaged-1").is_dir()
    assert step_lines(tmp_path / "run") == step_lines(whole)
    assert weights_and_state(tmp_path / "run") == weights_and_state(whole)


def test_run_whose_checkpoints_are_all_damaged_is_refused(small_config, tmp_path):
    """Nothing is started over silently."""
    run_training(small_config, tmp_path, max_steps=2)
    (list_checkpoints(tmp_path)[-1] / "state.json").unlink()
    with pytest.raises(InputError, match="state.json is missing\n.*has no undamaged checkpoint"):
        run_training(small_config, tmp_path, resume=True)


@pytest.mark.slow
def test_resume_from_an_older_checkpoint_drops_later_lines(small_config, tmp_path):
    """After a crash between checkpoints every step is in metrics.jsonl exactly once, with the same values."""
    config = change(small_config, "checkpoint", every_steps=5, keep_last=10)
    run_training(config, tmp_path)
    whole, final = step_lines(tmp_path), weights_and_state(tmp_path)
    for folder in list_checkpoints(tmp_path)[2:]:
        (folder / "manifest.json").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "lo')
    run_training(config, tmp_path, resume=True)
    assert step_lines(tmp_path) == whole
    assert weights_and_state(tmp_path) == final


def test_two_runs_of_one_seed_are_equal_and_of_another_differ(small_config, tmp_path):
    """A run is a function of its config; the seed is part of it."""
    run_training(small_config, tmp_path / "a")
    run_training(small_config, tmp_path / "b")
    run_training(change(small_config, "train", seed=1), tmp_path / "c")
    assert weights_and_state(tmp_path / "a") == weights_and_state(tmp_path / "b") != weights_and_state(tmp_path / "c")


def test_evaluating_and_saving_do_not_change_the_run(small_config, tmp_path):
    """A run with many evaluations and checkpoints ends with the weights of one without."""
    run_training(change(small_config, "model", router_noise=0.1), tmp_path / "plain")
    busy = change(small_config, "model", router_noise=0.1)
    busy = change(change(busy, "train", eval_every_steps=4), "checkpoint", every_steps=3)
    run_training(busy, tmp_path / "busy")
    assert weights_and_state(tmp_path / "plain") == weights_and_state(tmp_path / "busy")


def test_limits_stop_with_an_evaluation_and_a_checkpoint(small_config, tmp_path):
    """max_steps and max_minutes end cleanly at a step and change no schedule."""
    run, outcome = run_training(small_config, tmp_path / "steps", max_steps=4)
    assert (outcome, run.state.step, run.schedule.total_tokens) == ("max_steps", 4, 6144)
    assert read_metrics(tmp_path / "steps" / "metrics.jsonl")[-1].keys() >= {"val/code/ce_loss"}
    assert load_model(tmp_path / "steps").step == 4
    run, outcome = run_training(small_config, tmp_path / "minutes", max_minutes=1e-6)
    assert (outcome, run.state.step) == ("max_minutes", 1)


def test_signal_finishes_the_step_and_saves(small_config, tmp_path):
    """SIGINT ends the run after the step it arrives in, with a checkpoint."""

    class Interrupting(Silent):
        def progress(self, tokens_seen, line):
            if line["step"] == 6:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # that of a job in the background ignores it
    run, outcome = run_training(small_config, tmp_path, Interrupting())
    assert outcome == "SIGINT"
    assert load_model(tmp_path).step == run.state.step == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_run_folder_that_holds_a_run_is_refused(small_config, tmp_path):
    """Without --resume a second run in the folder is an error that says what to do."""
    run_training(small_config, tmp_path, max_steps=1)
    with pytest.raises(InputError, match=r"already holds a run; continue it with --resume"):
        run_training(small_config, tmp_path)


def test_run_folder_in_use_is_refused(small_config, tmp_path):
    """Two processes never train in one folder."""
    run = set_up_run(small_config, tmp_path, CPU, resume=True, say=lambda text: None)
    with open_run_folder(tmp_path, run.identity, None), pytest.raises(InputError, match="in use by another"):
        run_training(small_config, tmp_path, resume=True)


def test_run_folder_that_changed_meanwhile_is_refused(small_config, tmp_path):
    """A run that another process trained between set-up and start is not written over."""
    slow = set_up_run(small_config, tmp_path, CPU, say=lambda text: None)
    run_training(small_config, tmp_path, max_steps=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with (
        pytest.raises(InputError, match="changed while this run was being prepared"),
        open_run_folder(tmp_path, slow.identity, slow.resumed_from),
    ):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_resume_with_other_settings_names_them(small_config, tmp_path):
    """Settings that would change the result are refused with both values; others may change."""
    run_training(small_config, tmp_path, max_steps=2)
    with pytest.raises(InputError, match=r"train\.seed was 0 and is now 3\n.*--allow-changes train\.seed"):
        run_training(change(small_config, "train", seed=3), tmp_path, resume=True)
    harmless = change(change(small_config, "checkpoint", keep_last=7), "train", eval_every_steps=2)
    _, outcome = run_training(harmless, tmp_path, resume=True)
    assert outcome == "finished"


def test_resume_with_other_data_is_refused(small_config, corpus_dir, tmp_path):
    """A source whose text changed is named."""
    for path in corpus_dir.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sources = tuple(
        dataclasses.replace(source, files=str(tmp_path / f"{source.name}_*.txt"))
        for source in small_config.data.sources
    )
    config = change(small_config, "data", sources=sources)
    run_training(config, tmp_path / "run", max_steps=2)
    changed = tmp_path / "prose_03.txt"
    changed.write_text(changed.read_text().replace("e", "a"))
    with pytest.raises(InputError, match=r"data\.prose was .tokens with digest (.|\n)*--allow-changes data.prose;"):
        run_training(config, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_init_from_continues_at_a_longer_context(small_config, tmp_path):
    """A new run takes weights and tokenizer, with its own schedule, max_seq_len and rope_theta."""
    run_training(small_config, tmp_path / "first")
    longer = change(small_config, "model", max_seq_len=128, rope_theta=40_000.0)
    stages = (dataclasses.replace(small_config.schedule.stages[-1], until_tokens=1024, seq_len=128, batch_tokens=256),)
    longer = change(change(longer, "schedule", stages=stages, warmup_tokens=0), "train", micro_batch_tokens=256)
    second, outcome = run_training(longer, tmp_path / "second", init_from=tmp_path / "first")
    assert outcome == "finished"
    first_line = read_metrics(tmp_path / "second" / "metrics.jsonl")[0]
    assert first_line["step"] == 0
    untrained = read_metrics(tmp_path / "first" / "metrics.jsonl")[0]
    assert first_line["val/code/ce_loss"] < untrained["val/code/ce_loss"] - 0.3
    assert (tmp_path / "second/tokenizer.json").read_text() == (tmp_path / "first/tokenizer.json").read_text()


def test_init_from_another_shape_names_the_keys(small_config, tmp_path):
    """Weights of another model are refused with both values."""
    run_training(small_config, tmp_path / "first", max_steps=1)
    with pytest.raises(InputError, match=r"model\.d_ff is 32 in that model, got 48"):
        run_training(change(small_config, "model", d_ff=48), tmp_path / "second", init_from=tmp_path / "first")
    assert not (tmp_path / "second").exists()


def test_vocabulary_smaller_than_the_tokenizer_is_refused(small_config, tmp_path):
    """model.vocab_size may be larger than the tokenizer's, never smaller."""
    with pytest.raises(InputError, match=r"model\.vocab_size must be at least the tokenizer's 400, got 300"):
        run_training(change(small_config, "model", vocab_size=300), tmp_path)
    run, _ = run_training(change(small_config, "model", vocab_size=448), tmp_path, max_steps=1)
    assert run.state.model.output.weight.shape[0] == 448


def test_open_schedule_is_one_big_epoch(small_config, tmp_path):
    """Without a total the run passes over prose once and over code twice, to within a chunk."""
    stages = (
        *small_config.schedule.stages[:2],
        dataclasses.replace(small_config.schedule.stages[2], until_tokens=None),
    )
    run = set_up_run(change(small_config, "schedule", stages=stages), tmp_path, CPU, say=lambda text: None)
    sizes = {source.config.name: len(source.train) for source in run.data.sources}
    assert sizes["prose"] + 2 * sizes["code"] - run.schedule.total_tokens in range(64)
    assert run.passes == {"prose": pytest.approx(1, rel=0.01), "code": pytest.approx(2, rel=0.01)}


@pytest.mark.slow
def test_round_ends_are_said_and_resumed(small_config, tmp_path):
    """The start says where stages really end; the config that is saved has these ends, and the same run goes on."""
    ends = zip(small_config.schedule.stages, (1010, 3000, 6000), strict=True)
    stages = tuple(dataclasses.replace(stage, until_tokens=end) for stage, end in ends)
    config, said = change(small_config, "schedule", stages=stages), []
    run = set_up_run(config, tmp_path / "run", CPU, say=said.append)
    parts = ("ends at 1,008", "one sequence of 16 ", "ends at 2,976", "one sequence of 32 ", "ends at 5,952")
    notes = [text for text in said if text.startswith("note: stage ")]
    assert [part in note for part, note in zip(parts, notes, strict=True)] == [True] * 5
    assert [stage.until_tokens for stage in run.config.schedule.stages] == [1008, 2976, 5952]
    run_training(config, tmp_path / "run", max_steps=9)
    run, outcome = run_training(config, tmp_path / "run", resume=True)
    assert (outcome, run.state.tokens_seen, run.changes) == ("finished", 5952, [])
    assert steps(tmp_path / "run")[-1]["loss"] == steps(whole_run(config))[-1]["loss"]
    shapes = [(line["seq_len"], line["batch_tokens"]) for line in steps(tmp_path / "run")]
    assert [shape for shape in shapes if shape[0] == shape[1]] == [(16, 16), (32, 32)]


def test_evaluation_by_hand(small_config, tmp_path):
    """ce_loss is the mean over the scored tokens; bits per byte divides the total bits by the text's bytes."""
    run, _ = run_training(small_config, tmp_path, max_steps=2)
    score = run.evaluator(run.state.model, "fp32")["code"]
    tokens = torch.from_numpy(run.data.sources[1].validation.tokens[: 512 + 1].astype("int64"))
    with torch.no_grad():
        logits = run.state.model.eval()(tokens[:-1].view(-1, 64)).logits
    ce_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:])
    text = run.data.tokenizer.decode(tokens[1:].tolist()).replace("<|endoftext|>", "")
    assert score.n_tokens == 512
    assert score.ce_loss == pytest.approx(float(ce_loss), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(float(ce_loss) * 512 / 0.6931472 / len(text.encode()), rel=0.005)


def test_second_interrupt_stops_at_once():
    """The first SIGINT asks, the second raises; afterwards Python's own handling is back."""
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_interrupt_in_the_last_step_still_evaluates(small_config, tmp_path):
    """A run whose schedule has ended is finished, signal or not."""

    class Late(Silent):
        def progress(self, tokens_seen, line):
            if tokens_seen == 6144:
                os.kill(os.getpid(), signal.SIGTERM)

    _, outcome = run_training(small_config, tmp_path, Late())
    assert outcome == "finished"
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["tokens_seen"] == 6144
    assert "val/prose/ce_loss" in read_metrics(tmp_path / "metrics.jsonl")[-1]


@pytest.mark.slow
def test_run_with_documents_kept_apart(small_config, tmp_path):
    """It trains, scores fewer tokens, none of them behind an end-of-text, and resumes to the bit."""
    config = change(small_config, "data", document_masking=True)
    run, outcome = run_training(config, tmp_path / "whole")
    assert outcome == "finished"
    run_training(config, tmp_path / "pieces", max_steps=9)
    run_training(config, tmp_path / "pieces", resume=True)
    assert weights_and_state(tmp_path / "whole") == weights_and_state(tmp_path / "pieces")
    apart = build_evaluator(config, run.data)(run.state.model, "fp32")["prose"]
    joined = build_evaluator(small_config, run.data)(run.state.model, "fp32")["prose"]
    rows = validation_rows(run.data.sources[0].validation.tokens, 64, 512)
    n_ends = int((rows.inputs == run.data.tokenizer.end_of_text_id).sum())
    assert n_ends > 0
    assert apart.n_tokens == joined.n_tokens - n_ends


def test_resume_of_a_run_in_training_says_that_it_is_in_use(small_config, tmp_path):
    """Before anything in the folder is read."""
    run, _ = run_training(small_config, tmp_path, max_steps=2)
    with (
        open_run_folder(tmp_path, run.identity, list_checkpoints(tmp_path)[-1]),
        pytest.raises(InputError, match="is in use by another training process"),
    ):
        set_up_run(small_config, tmp_path, CPU, resume=True)


def test_start_that_failed_early_does_not_block_the_next(small_config, tmp_path):
    """A folder with a config and nothing else holds no run."""
    (tmp_path / "config.yaml").write_text("model: {}")
    assert run_training(small_config, tmp_path, max_steps=1)[1] == "max_steps"


def test_run_that_cannot_fit_is_warned_of_before_it_is_built(small_config, tmp_path, monkeypatch):
    """With the memory that it takes, the memory that is free, and what to lower."""
    said: list[str] = []
    monkeypatch.setattr(fits, "available_memory_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(setup, "build_state", lambda *_: pytest.fail("built"))
    with pytest.raises(pytest.fail.Exception):
        setup.set_up_run(small_config, tmp_path, CPU, say=said.append)
    (text,) = [text for text in said if text.startswith("WARNING")]
    assert "1 MB are free; lower train.micro_batch_tokens (now 192), set train.activation_checkpointing=true" in text


def test_a_pipeline_takes_no_step_of_ones_own(small_config, tmp_path):
    """Because its ranks have no whole model, the run is refused before it starts."""
    team = copy.copy(SOLO)
    team.layout = Layout(pipeline=2)
    run = dataclasses.replace(set_up_run(small_config, tmp_path, CPU, say=lambda text: None), team=team)
    with pytest.raises(InputError, match="a step function of your own needs parallel.pipeline=1, got 2"):
        train(run, Limits(), Silent(), lambda run, plan, should_record: None)
    assert not (tmp_path / "metrics.jsonl").exists()
