"""Reading a run for reports: what is there is read, what is missing is said, and nothing stops it."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save
from small_runs import change, run_training

from moe_gpt.config import RunConfig
from moe_gpt.errors import InputError
from moe_gpt.report import run_records
from moe_gpt.report.report import write_report
from moe_gpt.report.run_records import read_run


@pytest.fixture(scope="module")
def finished_run(small_values, tmp_path_factory):
    """A whole run with three evaluations."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_training(change(RunConfig.from_mapping(small_values), "train", eval_every_steps=13), folder)
    return folder


@pytest.fixture
def run_dir(finished_run, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(finished_run, tmp_path / "run")


def test_whole_run_is_read(run_dir):
    """Every line in its kind, arrays beside them, nothing to note."""
    run = read_run(run_dir)
    assert run.notes == []
    assert run.sources == ["prose", "code"]
    assert [line["step"] for line in run.steps] == list(range(1, 27))
    assert [line["step"] for line in run.records] == [5, 10, 15, 20, 25]
    assert [line["step"] for line in run.evaluations] == [arrays.step for arrays in run.arrays] == [0, 13, 26]
    tokens, loss = run.scores("code")
    assert tokens[-1] == 6144
    last = run.arrays[-1]
    assert loss[-1] == pytest.approx(last.nats["code"].sum() / last.counts["code"].sum())
    assert run.record_values("routing", "load")[1].shape == (5, 2, 4)
    assert run.record_values("routing", "margin")[1].shape == (5, 2)
    assert last.slices["prose"].choices.shape[:1] == (2,)
    assert last.gradients.routers.shape == (2,)
    assert len(run.record_values("groups", "routers", "update_norm")[1]) == 5
    assert run.tokenizer.decode(last.slices["code"].tokens[0].tolist())
    assert run.events[0]["kind"] == "start"


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("config.yaml", None, "config.yaml cannot be read"),
        ("config.yaml", "[1, 2", "config.yaml cannot be read"),
        ("config.yaml", "text", "config.yaml has no settings"),
        ("config.yaml", "{data: [3], model: x}", "config.yaml: model is no section"),
        ("config.yaml", "{data: [3], model: x}", "config.yaml: data is no section"),
        ("config.yaml", "{data: {sources: prose}}", "config.yaml: data.sources is no list of sections"),
        ("config.yaml", "{data: {sources: [prose]}}", "config.yaml: data.sources is no list of sections"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read, so tokens have no text"),
        ("tokenizer.json", None, "tokenizer.json cannot be read, so tokens have no text"),
        ("events.jsonl", None, "events.jsonl cannot be read"),
        ("metrics.jsonl", None, "metrics.jsonl cannot be read"),
        ("evaluations/step_00000013.safetensors", "broken", "step_00000013.safetensors cannot be read"),
        ("evaluations/step_latest.safetensors", "broken", "step_latest.safetensors cannot be read"),
    ],
)
def test_what_cannot_be_read_is_noted(run_dir, name, content, note):
    """What cannot be read is noted, and the rest is read."""
    if content is None:
        (run_dir / name).unlink()
    else:
        (run_dir / name).write_text(content)
    run = read_run(run_dir)
    assert any(text.startswith(note) for text in run.notes), run.notes
    assert len(run.steps) == (0 if name == "metrics.jsonl" else 26)
    assert len(run.arrays) == (2 if "00013" in name else 3)
    assert run.sources == ["prose", "code"] or name == "metrics.jsonl"


def test_damaged_lines_are_counted_and_passed_over(run_dir):
    """Those before and after them are read; a pickle is no array."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    step = json.loads(lines[1])
    nowhere = {key: value for key, value in step.items() if key != "tokens_seen"}
    damaged = ['{"step": 3, "lo', '{"no": "step"}', json.dumps(step | {"lr": "a"}), json.dumps(nowhere)]
    path.write_text("\n".join([*lines[:3], *damaged, *lines[3:]]) + "\n")
    run = read_run(run_dir)
    assert len(run.steps) == 26
    assert run.notes == [f"metrics.jsonl: 4 of {len(lines) + 4} lines cannot be read"]


def test_run_that_has_hardly_begun(run_dir):
    """No evaluation, no recording: said, not raised."""
    line = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[1])
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    shutil.rmtree(run_dir / "evaluations")
    run = read_run(run_dir)
    assert [note.partition(",")[0] for note in run.notes] == ["no evaluation", "no recorded steps"]
    assert run.scores("code")[0].shape == (0,)
    assert run.record_values("routing", "load")[1].size == 0


def test_run_of_an_older_version(run_dir):
    """Without arrays and recordings it still has its losses."""
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "groups" not in line]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    shutil.rmtree(run_dir / "evaluations")
    run = read_run(run_dir)
    assert [note.partition(" (")[0] for note in run.notes][0] == "no arrays of evaluations"
    assert np.isfinite(run.scores("prose")[1]).all()


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_what_is_no_run_is_refused(tmp_path, make):
    """A folder that holds no run is refused by its name."""
    make(tmp_path / "there")
    with pytest.raises(InputError, match="there"):
        read_run(tmp_path / "there")


def test_folder_of_runs_is_refused_by_the_names_of_the_runs(tmp_path):
    """At most five are named; what is no run is not."""
    for name in "bac":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    (tmp_path / "b" / "metrics.jsonl").touch()
    with pytest.raises(InputError) as caught:
        read_run(tmp_path)
    assert str(caught.value).endswith(f": {tmp_path / 'a'}, {tmp_path / 'b'}")
    for number in range(5):
        (tmp_path / f"run-{number}").mkdir()
        (tmp_path / f"run-{number}" / "config.yaml").touch()
    with pytest.raises(InputError, match=r"run-2, and 2 more$"):
        read_run(tmp_path)


def test_arrays_that_do_not_belong_are_left_out(run_dir):
    """Another model's file by its shape, and an evaluation without a file by its step: both are said."""
    last = run_dir / "evaluations" / "step_00000026.safetensors"
    arrays = load_file(last)
    arrays["prose/tokens_per_expert"] = np.zeros((7, 3), dtype=np.int64)
    last.write_bytes(save(arrays))
    run = read_run(run_dir)
    assert [found.step for found in run.arrays] == [0, 13]
    assert (
        run.notes[0] == "step_00000026.safetensors is of another model, and left out: it has not 2 layers of 4 experts"
    )
    assert run.notes[1].startswith("no arrays of the evaluations after steps 26")


def test_sources_have_the_same_order_in_every_evaluation(run_dir, monkeypatch):
    """Whatever order safetensors gives: else saturation would compare tokens of one source with those of another."""
    orders = itertools.cycle([sorted, functools.partial(sorted, reverse=True)])
    monkeypatch.setattr(run_records, "load", lambda data: dict(next(orders)(load(data).items())))
    arrays = read_run(run_dir).arrays
    assert (
        len({tuple(found.slices) for found in arrays}) == len({tuple(found.tokens_per_expert) for found in arrays}) == 1
    )


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        (None, "", []),
        ("scores.json", '{"before": {', ["scores.json cannot be read"]),
        ("scores.json", "[1]", ["scores.json cannot be read"]),
    ],
)
def test_scores_of_a_stage_are_read_where_there_are_any(run_dir, name, content, note):
    """A run of pre-training has none, which is no gap; damaged ones are one note."""
    if name:
        (run_dir / name).write_text(content, encoding="utf-8")
    run = read_run(run_dir)
    assert run.stage_scores == {}
    assert [text.partition(":")[0] for text in run.notes] == note
    (run_dir / "scores.json").write_text('{"stage": "rl", "after": {}}', encoding="utf-8")
    assert read_run(run_dir).stage_scores == {"stage": "rl", "after": {}}


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"record_every_steps": 0}, "no recorded steps"),
        (
            {"record_tokens": 0},
            "the experts of single tokens and the gradients of cross entropy are not recorded",
        ),
    ],
)
def test_what_was_not_wanted_is_said_so(small_config, tmp_path, settings, note):
    """By the setting, not as a fault."""
    run_training(change(small_config, "train", **settings), tmp_path)
    (found,) = read_run(tmp_path).notes
    assert found.startswith(note)
    assert found.endswith(f"(train.{next(iter(settings))} is 0)")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="names are Unicode there")
def test_a_folder_whose_name_is_not_utf8_is_reported(run_dir, tmp_path):
    """Everything in it is read; pages show the bytes as escapes."""
    folders = [tmp_path / os.fsdecode(name) / "run" for name in (b"a\xff", b"b\xfe")]
    try:
        for folder in folders:
            shutil.copytree(run_dir, folder)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    runs = [read_run(folder) for folder in folders]
    assert [run.notes for run in runs] == [[], []]
    write_report(runs, folders[0].parent / "report.html")
    assert "a\\udcff/run" in (folders[0].parent / "report.html").read_text(encoding="utf-8")
    write_report(runs[:1], folders[0] / "report.html")
