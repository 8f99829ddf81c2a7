"""Supervised fine-tuning on the training loop: what is learned, what is kept, and that a resume changes nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from ranks import train_cases
from run_scripts import command, kill_after
from small_runs import CPU, change, run_training, steps, weights_and_state, whole_run

from moe_gpt.config import ConversationSourceConfig, RunConfig
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.interop import hugging_face
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.post_training.chat import SPECIAL_TOKENS
from moe_gpt.post_training.sft import SFT
from moe_gpt.post_training.stages import note_on_scores, stage_of
from moe_gpt.training import loop
from moe_gpt.training.loop import pretraining_step
from moe_gpt.training.saving.initial_weights import open_initial_weights
from moe_gpt.training.saving.saved_model import load_model
from moe_gpt.training.saving.vocabulary import grow
from moe_gpt.training.setup import Run, set_up_run
from moe_gpt.training.summary import describe_run

N_CONVERSATIONS = 12


def conversation(number: int) -> list[dict]:
    """Return a short one of two answers."""
    return [
        {"role": "user", "content": f"a{number}"},
        {"role": "assistant", "content": f"b{number}"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d" * (number % 4 + 1)},
    ]


@pytest.fixture
def base_run(small_config) -> Path:
    """The folder of a finished base run."""
    return whole_run(small_config)


@pytest.fixture
def rows_file(tmp_path) -> Path:
    """Conversations of several lengths."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation(n)}) + "\n" for n in range(N_CONVERSATIONS)))
    return path


@pytest.fixture
def sft_values(small_values, rows_file) -> dict:
    """Plain values of a stage of 12 steps."""
    kept = {key: small_values[key] for key in ("train", "checkpoint")}
    return kept | {
        "data": {"cache_dir": small_values["data"]["cache_dir"]},
        "sft": {"row_tokens": 64, "sources": [{"name": "own", "files": str(rows_file)}]},
        "schedule": {"stages": [{"until_tokens": 3072, "seq_len": 64, "batch_tokens": 256}]},
        "optimizer": {"lr": 1e-2},
    }


@pytest.fixture
def sft_config(sft_values) -> RunConfig:
    """The stage of ``sft_values``."""
    return RunConfig.from_mapping(sft_values)


def with_sft(config: RunConfig, **settings) -> RunConfig:
    """Return the config with other settings of its section."""
    return dataclasses.replace(config, sft=dataclasses.replace(config.sft, **settings))


def set_up(config: RunConfig, run_dir, init_from, **options) -> Run:
    """Return a run that can start."""
    options = {"say": lambda text: None, **options}
    return set_up_run(config, run_dir, CPU, init_from=str(init_from), stage=stage_of(config), **options)


def test_the_shape_and_the_text_are_those_of_the_base_run(sft_config, base_run, tmp_path):
    """The config need not repeat them; the vocabulary has grown by the special tokens."""
    run, base = set_up(sft_config, tmp_path / "run", base_run), load_model(base_run)
    assert run.config.model == dataclasses.replace(base.config.model, vocab_size=405)
    assert run.config.data.sources == base.config.data.sources
    assert [run.data.tokenizer.special_id(token) for token in SPECIAL_TOKENS] == list(range(400, 405))
    old, new = base.model.state_dict(), run.state.model.state_dict()
    assert all(torch.equal(tensor, new[name][: len(tensor)]) for name, tensor in old.items())
    for text in (f"{N_CONVERSATIONS} conversations, ", " passes", "forgetting is measured on held-out prose, code"):
        assert text in describe_run(run)


def test_forgetting_is_measured_on_the_tokens_of_pre_training(sft_config, base_run, small_config, tmp_path):
    """With the base run's own cache: the same ids, and so nearly the same loss before the first step."""
    run = set_up(sft_config, tmp_path / "run", base_run)
    base = set_up_run(small_config, tmp_path / "base", CPU, say=lambda text: None)
    for mine, theirs in zip(run.data.sources, base.data.sources, strict=True):
        assert mine.validation.digest == theirs.validation.digest
    loss = {name: score.ce_loss for name, score in base.evaluator(load_model(base_run).model, "fp32").items()}
    for name, score in run.evaluator(run.state.model, "fp32").items():
        assert score.ce_loss == pytest.approx(loss[name], abs=0.05)  # new tokens take a little probability


def test_a_stage_learns_its_answers_and_when_to_end(sft_config, base_run, tmp_path):
    """The loss on answers falls, and every answer's end is a target."""
    config = change(sft_config, "schedule", stages=[{"until_tokens": 16_384, "seq_len": 64, "batch_tokens": 256}])
    run, outcome = run_training(config, tmp_path / "run", init_from=str(base_run), stage=SFT)
    assert outcome == "finished"
    losses = [line["ce_loss"] for line in steps(tmp_path / "run")]
    assert losses[0] > 4
    assert losses[-1] < 1
    batch = run.stream.batch(0, 64, run.material.rows.n_tokens)
    end = run.data.tokenizer.special_id("<|im_end|>")
    assert (batch.targets == end).sum() == 2 * N_CONVERSATIONS


def test_the_loss_is_on_answers_alone(sft_config, base_run, tmp_path):
    """Only the places before answer tokens get a gradient: that of the header's last token does, the one before not."""
    run = set_up(sft_config, tmp_path / "run", base_run)
    batch = run.stream.batch(0, 64, 64)
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    hidden, _ = run.state.model.hidden_states(inputs)
    hidden.retain_grad()
    run.state.model.score(hidden.flatten(0, 1), run.state.model.output.weight, targets.flatten()).total.backward()
    has_gradient = hidden.grad.abs().sum(dim=-1)[0] > 0
    assert has_gradient.tolist() == (targets[0] >= 0).tolist()
    assert has_gradient.any()


def test_a_conversation_sees_nothing_of_its_row(sft_values, base_run, tmp_path):
    """In the micro-batches of the loop, it has the hidden states that it has alone; padding does not count."""
    stages = [{"until_tokens": 1024, "seq_len": 128, "batch_tokens": 128}]
    longer = {"model": {"max_seq_len": 128}, "sft": {**sft_values["sft"], "row_tokens": 128}}
    config = RunConfig.from_mapping(sft_values | longer | {"schedule": {"stages": stages}})
    run = set_up(config, tmp_path / "run", base_run)
    micro = next(loop._deal(run, run.schedule.at(0), 1))
    pad, ids = run.data.tokenizer.special_id("<|pad|>"), micro.inputs[0]
    first_end = int((ids == pad).int().argmax())
    second = ids[first_end + 1 :][: int((ids[first_end + 1 :] == pad).int().argmax())]
    model = run.state.model.eval()
    in_row, _ = model.hidden_states(micro.inputs, document_ids=micro.document_ids)
    alone, _ = model.hidden_states(second[None])
    place = slice(first_end + 1, first_end + 1 + len(second))
    torch.testing.assert_close(in_row[0, place], alone[0], atol=1e-5, rtol=1e-5)
    assert len(second) > 10
    assert torch.equal(micro.valid_mask[0], ids != pad)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_resumed_stage_ends_with_the_same_bytes(sft_config, base_run, tmp_path, step):
    """After a stop at a step, in a new process's state; --init-from is not needed again."""
    run_training(sft_config, tmp_path / "whole", init_from=str(base_run), stage=SFT)
    run_training(sft_config, tmp_path / "cut", init_from=str(base_run), stage=SFT, max_steps=step)
    torch.manual_seed(99)
    _, outcome = run_training(sft_config, tmp_path / "cut", resume=True, stage=SFT)
    assert outcome == "finished"
    assert weights_and_state(tmp_path / "cut") == weights_and_state(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("n_checkpoints", "adapters"), [(1, None), (2, None), (2, {"rank": 2})])
def test_a_killed_stage_ends_with_the_same_bytes(sft_values, base_run, tmp_path, n_checkpoints, adapters):
    """Killed while it runs, once its first or second checkpoint is there."""
    values = {**sft_values, "checkpoint": {"every_steps": 3, "keep_last": 9}, "adapters": adapters}
    values["schedule"] = {"stages": [{"until_tokens": 30_720, "seq_len": 64, "batch_tokens": 256}]}
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(values))
    kill_after(n_checkpoints, tmp_path / "killed", "finetune", tmp_path / "chat.yaml", "--init-from", base_run)
    done = command("finetune", tmp_path / "chat.yaml", "--run-dir", tmp_path / "killed", "--resume")
    assert done.returncode == 0, done.stderr
    done = command("finetune", tmp_path / "chat.yaml", "--run-dir", tmp_path / "whole", "--init-from", base_run)
    assert done.returncode == 0, done.stderr
    assert weights_and_state(tmp_path / "killed") == weights_and_state(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}])
def test_two_processes_learn_what_one_learns(sft_values, base_run, tmp_path, parallel):
    """Without auxiliary losses, whose means over rows depend on which rank has the padding."""
    values = {**sft_values, "loss": {"load_balancing_loss_weight": 0.0, "router_z_loss_weight": 0.0}}
    case = {"values": {**values, "parallel": parallel}, "init_from": str(base_run)}
    assert train_cases({"two": case}, 2, tmp_path / "ranks") == {"two": "finished"}
    run, _ = run_training(RunConfig.from_mapping(values), tmp_path / "one", init_from=str(base_run), stage=SFT)
    found = load_model(tmp_path / "ranks" / "two").model.state_dict()
    for name, tensor in run.state.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)


def test_changed_conversations_stop_a_resume(sft_config, base_run, rows_file, tmp_path):
    """Their digest is part of the checkpoint."""
    run_training(sft_config, tmp_path / "run", init_from=str(base_run), stage=SFT, max_steps=1)
    rows_file.write_text(rows_file.read_text().replace("b1", "e1"))
    with pytest.raises(InputError, match="data.conversations was 'tokens with digest"):
        run_training(sft_config, tmp_path / "run", resume=True, stage=SFT)


def test_a_batch_does_not_depend_on_how_it_is_cut(sft_config, base_run, tmp_path):
    """Gradients of one micro-batch and of one for each row agree, although rows have different numbers of answers."""
    config = dataclasses.replace(sft_config, loss=dataclasses.replace(sft_config.loss, load_balancing_loss_weight=0.0))
    results = []
    for micro in (256, 64):
        run = set_up(change(config, "train", micro_batch_tokens=micro), tmp_path / str(micro), base_run)
        plan = run.schedule.at(0)
        metrics = pretraining_step(run, plan, False).metrics
        results.append([float(metrics.ce_loss), float(metrics.router_z_loss), float(metrics.grad_norm)])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_micro_batch_without_answers_is_no_nan(sft_config, base_run, tmp_path):
    """Its balance loss still counts."""
    run = set_up(sft_config, tmp_path / "run", base_run)
    is_answer = run.material.rows.is_answer
    run.material.rows.is_answer = type("None", (), {"__getitem__": lambda _, at: 0 * is_answer[at]})()
    metrics = pretraining_step(run, run.schedule.at(0), False).metrics
    assert float(metrics.ce_loss) == 0
    assert float(metrics.load_balancing_loss) >= 1
    assert float(metrics.skipped) == 0


def test_fewer_rows_than_a_batch_repeat(sft_config, base_run, rows_file, tmp_path):
    """The start says how often; the weights move."""
    rows_file.write_text(rows_file.read_text().splitlines()[0] + "\n")
    before = load_model(base_run).model.output.weight
    run, _ = run_training(sft_config, tmp_path / "run", init_from=str(base_run), stage=SFT, max_steps=3)
    assert "1 conversations, " in describe_run(run)
    assert "about 48.0 passes" in describe_run(run)
    assert not torch.equal(run.state.model.output.weight[: len(before)], before)


def test_too_long_conversations_are_an_error_or_counted(sft_config, base_run, rows_file, tmp_path):
    """The error has the number and the first row."""
    long = {"messages": [{"role": "user", "content": "a b " * 60}, {"role": "assistant", "content": "c"}]}
    rows_file.write_text(rows_file.read_text() + json.dumps(long) + "\n")
    with pytest.raises(InputError, match=r"rows.jsonl row 13: the conversation has .* room for 63 .* 1 of 13"):
        set_up(sft_config, tmp_path / "run", base_run)
    run = set_up(with_sft(sft_config, on_too_long="drop"), tmp_path / "run", base_run)
    assert "own: 12 conversations" in describe_run(run)
    assert "1 too long, left out" in describe_run(run)


def test_forms_of_rows_are_counted_at_the_start(sft_config, base_run, rows_file, tmp_path):
    """Also where the rows are in the cache already."""
    for _ in range(2):
        assert "12 in OpenAI's form (messages)" in describe_run(set_up(sft_config, tmp_path / "run", base_run))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model": {"n_layers": 3}}, "model.n_layers is 2 in that model, got 3"),
        ({"model": {"max_seq_len": 32}}, "seq_len must be at most the model's max_seq_len=32, got 64"),
        ({"train": {"train_only": ["attention", "nothing"]}}, "train.train_only: 'nothing' matches no parameter"),
    ],
)
def test_what_does_not_fit_the_base_run_is_an_error(sft_values, base_run, tmp_path, settings, text):
    """Before anything is written."""
    values = {key: {**sft_values.get(key, {}), **section} for key, section in settings.items()}
    with pytest.raises(InputError) as error:
        set_up(RunConfig.from_mapping(sft_values | values), tmp_path / "run", base_run)
    assert text in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_stage_needs_weights_to_start_with(sft_config, tmp_path):
    """The error names the option."""
    with pytest.raises(InputError, match="fine-tuning needs --init-from"):
        set_up_run(sft_config, tmp_path / "run", CPU, stage=SFT)


def test_only_named_parameters_learn(sft_config, base_run, tmp_path):
    """The others keep their bits, with gradients clipped by the norm of what learns."""
    config = change(sft_config, "train", train_only=(r"\.attention\.", "^output"))
    before = {
        name: p.detach().clone() for name, p in set_up(config, tmp_path / "a", base_run).state.model.named_parameters()
    }
    run, outcome = run_training(config, tmp_path / "run", init_from=str(base_run), stage=SFT)
    assert outcome == "finished"
    moved = {name for name, p in run.state.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".attention." in name or name == "output.weight"}


def exported(config: RunConfig, folder, tokenizer, vocab_size=None, **changes):
    """Write a Hugging Face folder of a new model, and return its path."""
    torch.manual_seed(1)
    model = MoEGPT(dataclasses.replace(config.model, vocab_size=vocab_size or tokenizer.vocab_size, **changes))
    hugging_face.save(model, folder, tokenizer)
    return folder


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"n_experts": 1, "top_k": 1}])
@pytest.mark.parametrize("padding", [0, 3, 40])
def test_a_folder_from_elsewhere_grows(small_config, base_run, tmp_path, changes, padding):
    """Tied or not, and where the model has more rows than the tokenizer has tokens."""
    tokenizer = load_model(base_run).tokenizer
    n = tokenizer.vocab_size
    folder = exported(small_config, tmp_path / "folder", tokenizer, n + padding, **changes)
    initial = open_initial_weights(folder, None)
    grown = grow(initial, SPECIAL_TOKENS, seed=0)
    assert grown.model.vocab_size == max(n + 5, n + padding)
    model = MoEGPT(grown.model)
    grown.copy_into(model)
    old, new = initial.read()["embedding.weight"], model.embedding.weight
    assert torch.equal(new[:n], old[:n])
    assert torch.equal(new[n + 5 :], old[n + 5 :])
    assert new[n : n + 5].unique(dim=0).shape[0] == 5
    torch.testing.assert_close(new[n : n + 5].mean(), old[:n].mean(), atol=0.02, rtol=0)
    if not model.config.tie_embeddings:
        mean = initial.read()["output.weight"][:n].mean(dim=0)
        torch.testing.assert_close(model.output.weight[n : n + 5], mean.expand(5, -1))


def test_a_vocabulary_that_has_the_tokens_stays(sft_config, base_run, tmp_path):
    """A stage after a stage does not grow again, and keeps the weights."""
    run_training(sft_config, tmp_path / "one", init_from=str(base_run), stage=SFT, max_steps=1)
    first = load_model(tmp_path / "one")
    second = set_up(sft_config, tmp_path / "two", tmp_path / "one")
    assert second.config.model.vocab_size == 405
    assert torch.equal(second.state.model.embedding.weight, first.model.embedding.weight)


def test_forgetting_of_unknown_text_is_left_out_and_said(sft_config, small_config, base_run, tmp_path):
    """A folder from elsewhere does not say what its model has read."""
    folder = exported(small_config, tmp_path / "folder", load_model(base_run).tokenizer)
    run, outcome = run_training(sft_config, tmp_path / "run", init_from=str(folder), stage=SFT)
    assert outcome == "finished"
    assert "forgetting is not measured: no held-out text" in describe_run(run)
    assert run.data.sources == ()
    _, outcome = run_training(sft_config, tmp_path / "run", resume=True, stage=SFT)
    assert outcome == "finished"


def test_text_of_pre_training_that_is_gone_stops_nothing(sft_config, small_values, base_run, tmp_path):
    """It is said, and forgetting is not measured."""
    sources = [{"name": "gone", "files": str(tmp_path / "gone*.txt")}]
    said = []
    config = dataclasses.replace(sft_config, data=RunConfig.from_mapping({"data": {"sources": sources}}).data)
    run = set_up(config, tmp_path / "run", base_run, say=said.append)
    assert run.data.sources == ()
    assert any("forgetting is not measured, because" in text for text in said)


def test_a_tokenizer_loses_what_was_added_and_nothing_else(base_run):
    """Growing twice is growing once, and the way back gives the same bytes."""
    tokenizer = load_model(base_run).tokenizer
    grown = tokenizer.with_special_tokens(SPECIAL_TOKENS)
    assert grown.with_special_tokens(SPECIAL_TOKENS).to_json() == grown.to_json()
    assert grown.without_added_tokens(SPECIAL_TOKENS).to_json() == tokenizer.to_json()
    assert isinstance(grown, Tokenizer)
    assert grown.encode("<|im_end|>") == tokenizer.encode("<|im_end|>")


def test_a_role_twice_in_a_row_is_kept_and_counted(sft_config, base_run, rows_file, tmp_path):
    """Results of tools may follow one another unsaid."""
    user, answer, tool = ({"role": role, "content": "a"} for role in ("user", "assistant", "tool"))
    for turns in ([user, user, answer], [user, answer, tool, tool, answer]):
        rows_file.write_text(rows_file.read_text() + json.dumps({"messages": turns}) + "\n")
    run = set_up(sft_config, tmp_path / "run", base_run)
    assert "own: 14 conversations" in describe_run(run)
    assert "1 with one role twice in a row, each turn kept as it is" in describe_run(run)


def test_conversations_without_scores_are_named(sft_config):
    """Those of files, and those of a built-in set whose questions the context does not hold."""
    sums = ConversationSourceConfig(name="sums", builtin="calculator", max_conversations=2)
    run = SimpleNamespace(config=with_sft(sft_config, sources=(*sft_config.sft.sources, sums)))
    assert note_on_scores(run, {"tool_call": 1}) == (
        "note: no scores for own, because only the built-in sets have questions with known answers"
    )
    assert "no scores for sums, because the context has no room" in note_on_scores(run, {})
