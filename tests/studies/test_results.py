"""A study's rows: what is finished, stale, failed or missing, and when a run is trained again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import filelock
import pytest
from small_studies import states, train_here

from moe_gpt.files.durable import read_digest
from moe_gpt.report.run_records import read_run
from moe_gpt.studies import results, tables
from moe_gpt.studies.plan import Study, load_study
from moe_gpt.studies.results import failure_of, look
from moe_gpt.studies.tables import summarise, write_tables
from moe_gpt.training.saving import changes

NAMES = ["dense-0", "dense-1", "moe-0", "moe-1"]


def files_of(folder: Path) -> dict[str, int]:
    """Return when each file was changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def table_of(study: Study) -> str:
    """Return table.json without CPU times."""
    table = summarise(study, look(study))
    for row in table["rows"]:
        assert row.pop("cpu_seconds") >= 0
    return json.dumps(table)


def test_finished_runs_are_rows_with_what_they_took(write_study, out):
    """Scores of each source, tokens, FLOPs and CPU time; equal runs have equal fingerprints but for their seeds."""
    rows = look(load_study(write_study(), out))
    assert [(row.run.name, row.state, row.cause) for row in rows] == [(name, "finished", "") for name in NAMES]
    assert {*rows[2].scores} == {f"{s}/{k}" for s in ("prose", "code") for k in ("ce_loss", "bits_per_byte")} | {
        "max_violation"
    }
    assert rows[0].totals["tokens"] == 1024
    assert rows[0].totals["flops"] == rows[0].run.flops
    assert 0 < rows[0].totals["cpu_seconds"] < 60
    assert len({row.fingerprint for row in rows}) == 4


@pytest.mark.slow
def test_an_arm_may_be_a_stage_after_pre_training(write_study, tmp_path):
    """It has the model, tokenizer and text of the arm that it starts with, and other settings make it stale."""

    def load(n_conversations: int) -> Study:
        source = f"{{name: sums, builtin: calculator, max_conversations: {n_conversations}}}"
        lines = [f"sft={{sources: [{source}], row_tokens: 256}}"]
        lines += ["schedule={stages: [{until_tokens: 1024, seq_len: 256, batch_tokens: 512}]}"]
        arms = {"moe": {}, "chat": {"init_from": "moe", "overrides": lines}}
        settings = {"model": {"max_seq_len": 256}, "train": {"micro_batch_tokens": 512}}
        file = write_study(settings, arms=arms, seeds=[0], comparisons=None)
        return load_study(file, tmp_path / "out")

    assert train_here(load(100)) == ["finished", "finished"]
    assert [(row.state, row.cause) for row in look(load(100))] == [("finished", "")] * 2
    assert [row.changed for row in look(load(90))] == [(), ("sft.sources.0.max_conversations",)]


def test_arms_are_compared_before_the_end(write_study, out):
    """By the last evaluation up to so many tokens, so that a table may show where curves cross."""
    asked = [{"name": str(at), "arms": ["dense", "moe"], "at_tokens": at, "source": "code"} for at in (1, 600, 1024)]
    study = load_study(write_study(comparisons=asked), out)
    lines = {run.name: read_run(run.folder).evaluations for run in study.runs}
    assert [line["tokens_seen"] for line in lines["moe-0"]] == [0, 512, 1024]
    for place, entry in enumerate(summarise(study, look(study))["comparisons"]):
        losses = [[lines[f"{arm}-{seed}"][place]["val/code/ce_loss"] for seed in (0, 1)] for arm in ("dense", "moe")]
        assert entry["difference"] == pytest.approx((sum(losses[1]) - sum(losses[0])) / 2)


def test_arms_are_compared_by_what_a_loss_costs(write_study, out):
    """Where the curve between two evaluations falls to it; an arm with a run that never does has no value."""
    runs = load_study(write_study(), out).runs
    losses = {run.name: [e["val/code/ce_loss"] for e in read_run(run.folder).evaluations] for run in runs}
    loss, lowest = min(values[0] for values in losses.values()), min(map(min, losses.values()))
    asked = [
        {"name": f"{measure} {at}", "arms": ["dense", "moe"], "at_loss": at, "measure": measure, "source": "code"}
        for at, measure in ((loss, "tokens"), (loss, "steps"), (lowest, "steps"))
    ]
    study = load_study(write_study(comparisons=asked), out)
    tokens, steps, never = summarise(study, look(study))["comparisons"]
    places = {name: place_of(loss, values) for name, values in losses.items()}
    expected = (places["moe-0"] + places["moe-1"] - places["dense-0"] - places["dense-1"]) / 2
    assert tokens["difference"] == pytest.approx(512 * expected)
    assert steps["difference"] == pytest.approx(4 * expected)
    assert [never["verdict"], never["difference"], sorted(never["seeds"])[0]] == ["open", None, 0]


def place_of(loss: float, curve: list[float]) -> float:
    """Return where a falling curve passes a loss, in evaluations."""
    place = next(place for place, value in enumerate(curve[1:]) if value <= loss)
    return place + (curve[place] - loss) / (curve[place] - curve[place + 1])


def test_nothing_changes_the_second_time(write_study, out):
    """Neither the workers nor the tables touch a file."""
    study = load_study(write_study(), out)
    write_tables(study)
    before = files_of(out)
    assert train_here(study) == ["finished"] * 4
    write_tables(study)
    locks = {path: time for path, time in files_of(out).items() if path not in before or before[path] != time}
    assert [path for path in locks if ".lock" not in path] == []


@pytest.mark.slow
def test_order_of_finishing_does_not_change_the_table(write_study, out, tmp_path):
    """Runs that are trained backwards give the same bytes, but for the CPU time."""
    path = write_study()
    other = load_study(path, tmp_path / "other")
    train_here(other, reverse=True)
    assert table_of(load_study(path, out)) == table_of(other)


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Pictures take a second."""
    monkeypatch.setattr(tables, "_write_page", lambda *parts: None)


@pytest.mark.parametrize(
    ("changed", "key"),
    [({"optimizer": {"lr": 1e-3}}, "optimizer.lr")],
)
def test_other_settings_make_runs_stale(write_study, out, changed, key):
    """They are left out of comparisons, and trained again only when asked; the old runs are kept."""
    study = load_study(write_study(changed), out)
    rows = look(study)
    assert [(row.state, row.changed, row.counts) for row in rows] == [("stale", (key,), False)] * 4
    told = summarise(study, rows)["comparisons"]
    assert {(entry["difference"], entry["verdict"]) for entry in told} == {(None, "open")}
    assert train_here(study) == ["stale"] * 4
    study = load_study(write_study(changed, arms={"moe": {}}, seeds=[1], comparisons=None), out)
    assert train_here(study, rerun=("stale",)) == ["finished"]
    assert states(study) == {"moe-1": "finished"}
    assert [path.name for path in (out / "replaced").iterdir()] == ["moe-1.1"]


def test_settings_that_change_no_result_make_nothing_stale(write_study, out):
    """Such as when checkpoints are saved."""
    assert {*states(load_study(write_study({"checkpoint": {"every_steps": 7}}), out)).values()} == {"finished"}


def test_other_code_makes_runs_stale_but_they_count(write_study, out, monkeypatch):
    """They are marked in the tables, and still answer the question."""
    digests = changes._code_digests()
    monkeypatch.setattr(changes, "_code_digests", lambda: digests | {"training/loop.py": "0"})
    study = load_study(write_study(), out)
    rows, text = write_tables(study)
    assert [(row.state, row.changed, row.counts) for row in rows] == [("stale", ("code",), True)] * 4
    assert "mixture v dense*" in text
    assert train_here(study) == ["stale"] * 4


def test_run_on_other_data_is_stale(write_study, out):
    """The newest run says what the data are now."""
    make_newest(out / "moe-1")
    state = next((out / "moe-1" / "checkpoints").glob("*8")) / "state.json"
    told = json.loads(state.read_text())
    told["data_fingerprint"]["prose"] = "0"
    change_file(state, json.dumps(told))
    rows = look(load_study(write_study(), out))
    assert [(row.state, row.changed) for row in rows] == [("stale", ("data.prose",))] * 3 + [("finished", ())]


def make_newest(run: Path) -> None:
    """Let a run have started a thousand years later."""
    events = run / "events.jsonl"
    events.write_text(events.read_text().replace('"time": "2', '"time": "3'))


def change_file(path: Path, text: str) -> None:
    """Change a file of a checkpoint together with the manifest."""
    path.write_text(text)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest[path.name] = read_digest(path)._asdict()
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_failed_run_is_a_row_and_does_not_stop_the_others(write_study, out):
    """It is tried again only when asked."""
    arms = {"lost": {"overrides": ["data.sources.0.files=nowhere"]}, "wild": {"overrides": ["optimizer.lr=1e30"]}}
    study = load_study(write_study(arms=arms | {"moe": {}}, seeds=[0], comparisons=None), out)
    assert train_here(study) == ["failed", "failed", "finished"]
    assert [row.cause.split(":")[0] for row in look(study)] == [
        "InputError",
        "its last evaluation has no finite scores",
        "",
    ]
    failure_of(study.runs[0]).write_text("another cause")
    assert train_here(study) == ["failed", "failed", "finished"]
    assert look(study)[0].cause == "another cause"
    assert train_here(study, rerun=("failed",)) == ["failed", "failed", "finished"]
    assert look(study)[0].cause.startswith("InputError")
    assert [path.name for path in (out / "replaced").iterdir()] == ["wild-0.1"]


@pytest.mark.slow
def test_interrupted_run_is_missing_and_goes_on(write_study, out, finished_runs):
    """It ends as if it had not been interrupted."""
    study = load_study(write_study(), out)
    for path in (out / "moe-0" / "checkpoints").glob("*8"):
        shutil.rmtree(path)
    assert states(study)["moe-0"] == "missing"
    assert look(study)[2].cause == "stopped at step 6"
    assert train_here(study) == ["finished"] * 4
    assert look(study)[2].scores == look(load_study(write_study(), finished_runs))[2].scores


def test_run_that_starts_with_another_one_follows_it(write_study, out):
    """Its start is that arm's run of the same seed; it is stale where that one was trained again later."""
    arms = {"moe": {}, "later": {"init_from": "moe", "overrides": ["optimizer.lr=1e-3"]}}
    study = load_study(write_study(arms=arms, seeds=[1], comparisons=None), out)
    assert train_here(study) == ["finished"] * 2
    assert "moe-1" in (next((out / "later-1" / "checkpoints").glob("*8")) / "state.json").read_text()
    assert {row.state for row in look(study)} == {"finished"}
    make_newest(out / "moe-1")
    assert [(row.run.name, row.changed) for row in look(study) if row.changed] == [("later-1", ("init_from",))]


def test_run_that_others_train_is_running(write_study, out):
    """A lock says so, and a worker leaves it alone."""
    study = load_study(write_study(arms={"moe": {"seeds": [7]}}, comparisons=None), out)
    place = results.locked_by(study.runs[0])
    place.mkdir(parents=True)
    with filelock.FileLock(place / ".lock"):
        assert states(study) == {"moe-7": "running"}
        assert train_here(study) == ["busy"]
    assert states(study) == {"moe-7": "missing"}
