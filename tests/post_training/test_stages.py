"""Reward models, preferences and reinforcement on rows of files, with whole small runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from run_scripts import command, kill_after
from safetensors.numpy import load_file as load_arrays
from small_runs import CPU, run_training, steps, weights_and_state, whole_run

from moe_gpt.api.loaded import load
from moe_gpt.commands.evaluate import EvaluateOptions, score_held_out
from moe_gpt.commands.finetune import note_on_rewards
from moe_gpt.config import RunConfig
from moe_gpt.data.stream import TrainingStream
from moe_gpt.errors import InputError
from moe_gpt.post_training.reward_model import load_reward_model
from moe_gpt.post_training.stages import (
    answers_to_fixed_prompts,
    examine,
    note_on_scores,
    routing_file,
    stage_of,
    write_findings,
)
from moe_gpt.post_training.tools import CALCULATOR
from moe_gpt.training.saving.initial_weights import open_initial_weights
from moe_gpt.training.saving.saved_model import load_model
from moe_gpt.training.setup import Run, set_up_run
from moe_gpt.training.stage import Start
from moe_gpt.training.summary import describe_run

SHORT = {"prompt": "a", "chosen": "b", "rejected": "c"}
LONG = {"prompt": "a", "chosen": "b c d e f g h i j k l m " * 9, "rejected": "c"}
SECTIONS = {
    "reward": {"pairs": {}},
    "dpo": {"pairs": {}},
    "rl": {"prompts": {}, "rewards": [{"rule": "right_answer"}], "samples": 2, "max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def values(small_values) -> dict:
    """Plain values that the stages have in common: 6 steps of 4 rows."""
    return {key: small_values[key] for key in ("train", "checkpoint")} | {
        "data": {"cache_dir": small_values["data"]["cache_dir"]},
        "schedule": {"stages": [{"until_tokens": 1536, "seq_len": 64, "batch_tokens": 256}]},
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    }


@pytest.fixture(scope="module")
def base_run(small_values) -> Path:
    """The folder of a finished base run."""
    return whole_run(RunConfig.from_mapping(small_values))


@pytest.fixture(scope="module")
def chat_run(base_run, values, tmp_path_factory) -> Path:
    """The folder of a run with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    says = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    sft = {"row_tokens": 64, "sources": [{"name": "own", "files": str(write(folder, {"messages": says}))}]}
    return trained(values | {"sft": sft}, folder / "chat", base_run, max_steps=1)


def write(folder: Path, *rows: dict) -> Path:
    """Return a new file with these rows."""
    path = folder / f"rows{len(list(folder.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values_of(values: dict, stage: str, file: Path, **settings) -> dict:
    """Return plain values with the section of a stage on the rows of a file."""
    section = {
        key: part | {"files": str(file)} if isinstance(part, dict) else part for key, part in SECTIONS[stage].items()
    }
    return values | {stage: section | settings}


def config_of(values: dict, stage: str, file: Path, **settings) -> RunConfig:
    """Return a stage on the rows of a file."""
    return RunConfig.from_mapping(values_of(values, stage, file, **settings))


def trained(config: RunConfig | dict, run_dir: Path, init_from: Path, **options) -> Path:
    """Train in a folder and return it."""
    config = RunConfig.from_mapping(config) if isinstance(config, dict) else config
    run_training(config, run_dir, init_from=str(init_from), stage=stage_of(config), **options)
    return run_dir


def set_up(config: RunConfig, run_dir: Path, init_from: Path) -> Run:
    """Return a run that can start."""
    return set_up_run(config, run_dir, CPU, init_from=str(init_from), say=lambda text: None, stage=stage_of(config))


def prompts(n: int, answer: str = "⊢∃") -> list[dict]:
    """Return prompts with an answer that the model never gives."""
    return [{"prompt": f"What is {number}?", "answer": answer} for number in range(n)]


def test_the_text_of_pretraining_is_the_same_after_a_stage(chat_run, capsys):
    """Evaluating says that it has changed where it has, and not because the stage has rows of its own beside it."""
    options = EvaluateOptions()
    score_held_out(load(chat_run), options)
    assert "has changed" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_pairs_of_files_are_learned(values, chat_run, tmp_path, stage):
    """The loss falls, and what is held out is scored."""
    pairs = [SHORT | {"prompt": f"a{number}"} for number in range(20)]
    config = config_of(values, stage, write(tmp_path, *pairs))
    run = set_up(config, tmp_path / "run", chat_run)
    assert len(run.material.items) + len(run.material.held_out) == 20
    folder = trained(config, tmp_path / "run", chat_run)
    losses = [line["ce_loss"] for line in steps(folder)]
    assert losses[-1] < losses[0] - 0.05
    assert examine(run, run.state.model)["held_out_pairs"].n == len(run.material.held_out) > 0


@pytest.mark.parametrize("stage", ["reward", "dpo"])
@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (SHORT | {"rejected": "b"}, "got the same answer twice"),
        (SHORT | {"rejected": " b\n"}, "must differ by more than blanks around them"),
        (LONG, "tokens, and there is room for 64 (schedule.stages.0.seq_len)"),
    ],
)
def test_a_bad_pair_of_a_file_is_an_error_with_its_row(values, chat_run, tmp_path, stage, row, cause):
    """Blank lines count as rows, and nothing is trained."""
    path = write(tmp_path, SHORT)
    path.write_text(f"{path.read_text()}\n{json.dumps(row)}\n")
    with pytest.raises(InputError) as error:
        set_up(config_of(values, stage, path), tmp_path / "run", chat_run)
    assert str(error.value).startswith(f"{path} row 3: ")
    assert cause in str(error.value)


@pytest.mark.parametrize("stage", ["reward", "dpo", "rl"])
def test_an_answer_that_leaves_no_room_for_a_prompt_is_an_error_of_the_config(values, tmp_path, stage):
    """It names both keys; pairs of files are not sampled."""
    key = f"{stage}.max_new_tokens" if stage == "rl" else f"{stage}.pairs.max_new_tokens"
    section = {**SECTIONS["rl"], "prompts": {"builtin": "lines"}, "max_new_tokens": 64}
    pairs = {"pairs": {"builtin": "lines", "max_new_tokens": 64}}
    with pytest.raises(InputError) as error:
        RunConfig.from_mapping(values | {stage: section if stage == "rl" else pairs})
    assert str(error.value).startswith(f"{key} must be less than schedule.stages.0.seq_len=64, got 64")
    if stage != "rl":
        RunConfig.from_mapping(values | {stage: {"pairs": {"files": "x", "max_new_tokens": 64}}})


@pytest.mark.parametrize("stage", ["reward", "dpo", "rl"])
def test_answers_and_experts_are_of_fixed_prompts(values, chat_run, tmp_path, stage):
    """The same prompts before and after, whatever the model; of an unchanged model the same answers and experts."""
    rows = [SHORT | {"prompt": f"What is {number}?"} for number in range(40)] if stage != "rl" else prompts(40)
    run = set_up(config_of(values, stage, write(tmp_path, *rows)), tmp_path / "run", chat_run)
    before = write_findings(run, run.state.model, "before")["answers_before"]
    assert 0 < len(before) <= min(8, len(run.material.held_out))
    first = "What is" if stage == "rl" else "user\nWhat is"
    assert all(row["prompt"].startswith(first) for row in before)
    assert {row["expected" if stage == "rl" else "chosen"] for row in before} == {"⊢∃" if stage == "rl" else "b"}
    assert len({row["prompt"] for row in before}) == len(before)
    after = write_findings(run, run.state.model, "after", forgetting={"before": {}})
    assert (after["answers_after"], after["forgetting"]) == (before, {"before": {}})
    files = [routing_file(tmp_path / "run", time).read_bytes() for time in ("before", "after")]
    with torch.no_grad():
        for layer in run.state.model.moe_layers():
            layer.router.weight.neg_()
        run.state.model.embedding.weight.mul_(-1)
    other = answers_to_fixed_prompts(run, run.state.model)
    assert [row["prompt"] for row in other] == [row["prompt"] for row in before]
    write_findings(run, run.state.model, "after")
    changed = load_arrays(routing_file(tmp_path / "run", "after"))
    kept = load_arrays(routing_file(tmp_path / "run", "before"))
    assert files[0] == files[1]
    np.testing.assert_array_equal(kept["tokens"], changed["tokens"])
    assert (kept["choices"] != changed["choices"]).any()
    config = run.config.model
    assert kept["choices"].shape == (config.n_layers, 1, kept["tokens"].size, config.top_k)


def test_long_pairs_are_left_out_and_counted(values, chat_run, tmp_path):
    """Where the config asks for it; the error names the setting."""
    path = write(tmp_path, SHORT, LONG)
    with pytest.raises(InputError, match=r"dpo\.pairs\.on_too_long=drop"):
        set_up(config_of(values, "dpo", path), tmp_path / "run", chat_run)
    pairs = {"files": str(path), "on_too_long": "drop"}
    run = set_up(config_of(values, "dpo", path, pairs=pairs), tmp_path / "run", chat_run)
    assert "1 pairs of answers" in describe_run(run)
    assert "; 1 too long, left out" in describe_run(run)
    pairs = pairs | {"files": str(write(tmp_path, LONG))}
    with pytest.raises(InputError, match="drop leaves none"):
        set_up(config_of(values, "dpo", path, pairs=pairs), tmp_path / "run", chat_run)


def test_every_prompt_leaves_room_for_an_answer(values, chat_run, tmp_path):
    """Held-out ones too: with room for exactly the longest prompt it starts, and with a token more it does not."""
    path = write(tmp_path, *prompts(30))
    run = set_up(config_of(values, "rl", path), tmp_path / "run", chat_run)
    every = [*run.material.reinforcement.prompts, *run.material.held_out]
    longest = max(len(prompt.ids) for prompt in every)
    set_up(config_of(values, "rl", path, max_new_tokens=64 - longest), tmp_path / "run", chat_run)
    with pytest.raises(InputError, match=rf"row \d+: the prompt has {longest} tokens, and there is room for"):
        set_up(config_of(values, "rl", path, max_new_tokens=65 - longest), tmp_path / "run", chat_run)
    section = {"prompts": {"files": str(path), "on_too_long": "drop"}, "max_new_tokens": 65 - longest}
    fitting = set_up(config_of(values, "rl", path, **section), tmp_path / "run", chat_run)
    n_longest = sum(len(prompt.ids) == longest for prompt in every)
    assert f"; {n_longest} too long, left out" in describe_run(fitting)
    assert any(len(prompt.ids) == longest for prompt in run.material.held_out)


def test_rewards_that_are_equal_move_nothing_and_say_so(values, chat_run, tmp_path):
    """Without a KL neither weight decay nor the routers' losses do; with one, only the KL moves the weights."""
    path = write(tmp_path, *prompts(4))
    for kl_weight, end in (
        (0.0, "nothing was learned, and no weight has moved"),
        (0.1, "only the KL moved the weights"),
    ):
        config = config_of(values, "rl", path, kl_weight=kl_weight)
        run, _ = run_training(config, tmp_path / str(kl_weight), init_from=str(chat_run), stage=stage_of(config))
        assert note_on_rewards(run).endswith(f"in 6 of 6 steps; {end}")
        before, after = (load_model(folder).model.state_dict() for folder in (chat_run, tmp_path / str(kl_weight)))
        assert all(torch.equal(before[name], after[name]) for name in before) == (kl_weight == 0)


def test_few_prompts_are_enough_for_a_reward_model(values, chat_run, tmp_path):
    """Its scores are normalised on several answers to each; there is no note where rewards differ."""
    reward = trained(config_of(values, "reward", write(tmp_path, SHORT)), tmp_path / "reward", chat_run)
    config = config_of(values, "rl", write(tmp_path, *prompts(3)), reward_model=str(reward))
    run, outcome = run_training(config, tmp_path / "run", init_from=str(chat_run), stage=stage_of(config))
    assert outcome == "finished"
    assert note_on_rewards(run) == ""


def test_a_reward_model_of_another_tokenizer_is_an_error(values, base_run, chat_run, tmp_path):
    """Its ids would mean other texts, or none."""
    config = config_of(values, "reward", write(tmp_path, SHORT))
    reward = trained(config, tmp_path / "reward", chat_run, max_steps=1)
    load_reward_model(reward, tokenizer=load_model(chat_run).tokenizer)
    with pytest.raises(InputError, match="must have the policy's tokenizer"):
        load_reward_model(reward, tokenizer=load_model(base_run).tokenizer)


@pytest.mark.parametrize("stage", ["reward", "dpo", "rl"])
def test_steps_that_cannot_be_are_refused_at_the_start(values, chat_run, tmp_path, monkeypatch, stage):
    """An odd number of rows, a batch that grows, and several processes."""
    path = write(tmp_path, SHORT | {"answer": "b"})
    for batch, cause in ((192, r"multiple of 2 .*= 3"), ([256, 512], "must be one number in the stage")):
        stages = [{"until_tokens": 1536, "seq_len": 64, "batch_tokens": batch}]
        config = config_of(values | {"schedule": {"stages": stages}}, stage, path)
        with pytest.raises(InputError, match=cause):
            set_up(config, tmp_path / "run", chat_run)
    run = set_up(config_of(values, stage, path), tmp_path / "run", chat_run)
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=f"the stage {stage} runs in one process, got 2"):
        run.stage.prepare(run.config, Start(tokenizer=run.data.tokenizer), print)


def test_a_prompt_needs_two_answers():
    """One has nothing to be compared with."""
    with pytest.raises(InputError, match=r"rl\.samples must be at least 2, got 1"):
        RunConfig.from_mapping({"rl": {**SECTIONS["rl"], "prompts": {"builtin": "lines"}, "samples": 1}})


def test_a_reward_model_is_not_exported(values, chat_run, tmp_path, capsys):
    """It has no text; a model that chats is, and the next command is to chat."""
    from moe_gpt.commands.export import export
    from moe_gpt.commands.next_command import command_line

    reward = trained(config_of(values, "reward", write(tmp_path, SHORT)), tmp_path / "reward", chat_run, max_steps=1)
    with pytest.raises(InputError, match="is a reward model"):
        export(str(reward), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    export(str(chat_run), tmp_path / "folder")
    assert command_line("chat", tmp_path / "folder") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        ([], "messages must be a list with at least one turn"),
        ("hi", "messages must be a list with at least one turn"),
        ([{"content": "hi"}], "messages.0.role must be one of"),
        ([{"role": "user", "content": None}], "messages.0.content must be text, got null"),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
            "messages.1 must not be a system turn",
        ),
    ],
)
def test_chat_names_the_message_that_is_wrong(chat_run, messages, cause):
    """In Python; an answer of the model may be empty, and a content may have parts."""
    loaded = load(chat_run, "cpu")
    with pytest.raises(InputError) as error:
        loaded.chat(messages)
    assert cause in str(error.value)
    for tools, cause in (("calculator", "tools must be a list"), (CALCULATOR, "tools must be a list"), ([5], "got 5")):
        with pytest.raises(InputError, match=cause):
            loaded.chat([{"role": "user", "content": "hi"}], tools=tools)
    parts = [{"type": "text", "text": "a"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": ""}, {"role": "user", "content": "b"}]
    assert isinstance(loaded.chat(talk, max_new_tokens=1), str)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("reward", {}),
        ("dpo", {}),
        ("rl", {}),
        ("rl", {"algorithm": "ppo", "pretraining_weight": 0.5}),
        ("rl", {"updates": 2}),
    ],
)
def test_a_killed_stage_of_files_ends_with_the_same_bytes(values, chat_run, tmp_path, stage, settings):
    """Killed while it runs, after its second checkpoint; reinforcement samples, and two kinds have more to save."""
    rows = [SHORT | {"prompt": f"a{number}", "answer": "b"} for number in range(8)]
    values = values | {"checkpoint": {"every_steps": 3, "keep_last": 99}}
    values["schedule"] = {"stages": [{"until_tokens": 15_360, "seq_len": 64, "batch_tokens": 256}]}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(values_of(values, stage, write(tmp_path, *rows), **settings)))
    words = tmp_path / "stage.yaml", "--init-from", chat_run
    kill_after(2, tmp_path / "killed", "finetune", *words)
    for last in (["--run-dir", tmp_path / "killed", "--resume"], [*words[1:], "--run-dir", tmp_path / "whole"]):
        done = command("finetune", words[0], *last)
        assert done.returncode == 0, done.stderr
    assert weights_and_state(tmp_path / "killed") == weights_and_state(tmp_path / "whole")


def test_the_loss_on_pretrainings_text_is_added_with_its_weight(values, chat_run, tmp_path):
    """Its gradient is the weight times that of pre-training's loss on the same tokens."""
    values = values | {"loss": {"load_balancing_loss_weight": 0, "router_z_loss_weight": 0}}
    config = config_of(values, "rl", write(tmp_path, *prompts(4)), kl_weight=0, pretraining_weight=0.5)
    run = set_up(config, tmp_path / "run", chat_run)
    mix, plan, model = run.material.reinforcement.mix, run.schedule.at(0), run.state.model
    batch = mix.stream.batch(0, plan.seq_len, plan.batch_tokens)
    loss = model.cross_entropy(*map(torch.from_numpy, (batch.inputs, batch.targets)))[0]
    wanted = torch.autograd.grad(loss.total / loss.n_valid, list(model.parameters()), allow_unused=True)
    terms = mix.add_gradients(run, plan)
    torch.testing.assert_close(terms.ce_loss, (loss.total / loss.n_valid).detach())
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, 0.5 * gradient)


def test_a_run_learns_pretrainings_text_beside_its_rewards(values, chat_run, tmp_path):
    """Where rewards move nothing, the text alone is learned, and each step records its loss."""
    config = config_of(values, "rl", write(tmp_path, *prompts(4)), kl_weight=0, pretraining_weight=1.0)
    run, _ = run_training(config, tmp_path / "run", init_from=str(chat_run), stage=stage_of(config))
    losses = [line["pretraining_loss"] for line in steps(run.run_dir)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_text_of_which_nothing_is_held_out_is_mixed_in(values, chat_run, tmp_path):
    """It is learned, and not scored."""
    values = values | {"data": values["data"] | {"validation_fraction": 0}}
    config = config_of(values, "rl", write(tmp_path, *prompts(4)), kl_weight=0, pretraining_weight=1.0)
    run, _ = run_training(config, tmp_path / "run", init_from=str(chat_run), stage=stage_of(config))
    assert all(line["pretraining_loss"] > 0 for line in steps(run.run_dir))


def test_each_update_reads_text_of_its_own(values, chat_run, tmp_path, monkeypatch):
    """Without gaps: two of a step, then those of the next step."""
    config = config_of(values, "rl", write(tmp_path, *prompts(4)), pretraining_weight=1.0, updates=2)
    read, batch = [], TrainingStream.batch
    monkeypatch.setattr(TrainingStream, "batch", lambda stream, *place: read.append(place[0]) or batch(stream, *place))
    run_training(config, tmp_path / "run", init_from=str(chat_run), stage=stage_of(config), max_steps=2)
    assert read == [0, 256, 512, 768]


def test_few_rows_have_no_scores_and_it_is_said(values, chat_run, tmp_path):
    """All of them are learned."""
    run = set_up(config_of(values, "rl", write(tmp_path, *prompts(1))), tmp_path / "run", chat_run)
    assert note_on_scores(run, {}) == "note: no scores, because none of the prompts is held out; there are few of them"
    assert note_on_scores(run, {"kl": 0}) == ""
    assert "forgetting is measured on held-out prose, code" in describe_run(run)


def test_text_that_is_not_known_cannot_be_mixed_in(values, chat_run, tmp_path):
    """Sources that nobody named are not read, and the error names the weight."""
    values = values | {"data": values["data"] | {"validation_fraction": 0}}
    config = config_of(values, "rl", write(tmp_path, *prompts(4)), pretraining_weight=0.5)
    start = Start(initial=open_initial_weights(chat_run, None)._replace(data=None))
    with pytest.raises(InputError, match=r"rl\.pretraining_weight=0\.5 needs the text of pre-training"):
        stage_of(config).prepare(*stage_of(config).settle(config, start, print), print)


def test_all_answers_of_a_prompt_are_on_one_side(values, chat_run, tmp_path):
    """A tenth of the prompts is held out, not of the rows; nothing of them is learned."""
    rows = [row | {"answer": str(number)} for row in prompts(40) for number in range(3)]
    run = set_up(config_of(values, "rl", write(tmp_path, *rows)), tmp_path / "run", chat_run)
    sides = [{tuple(each.ids) for each in side} for side in (run.material.items, run.material.held_out)]
    assert sides[1]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(("stage", "measure"), [("rl", "reward 0.000, kl "), ("dpo", "pair_accuracy ")])
def test_the_progress_of_a_stage_is_what_it_learns(values, chat_run, tmp_path, stage, measure):
    """And no cross entropy, which it has none of."""
    rows = prompts(4) if stage == "rl" else [SHORT]
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(values_of(values, stage, write(tmp_path, *rows))))
    done = command("finetune", tmp_path / "stage.yaml", "--init-from", chat_run, "--run-dir", tmp_path / "run")
    assert measure in done.stdout
    assert "ce_loss" not in done.stdout.partition("validation")[0]
