"""Comparing runs: on records made up in memory, with the answers by hand."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest

from moe_gpt.report import pictures
from moe_gpt.report.comparison.compare import Comparison, compare_runs
from moe_gpt.report.comparison.curves import NATS, QUANTITIES, _draw_panel, curves_over
from moe_gpt.report.comparison.runs import ComparedRun, group_runs
from moe_gpt.report.pictures import Picture
from moe_gpt.report.recorded import RunRecords, tell_apart

CONFIG = {
    "model": {
        "vocab_size": 10, "n_layers": 1, "d_model": 4, "n_heads": 1, "n_kv_heads": 1, "head_dim": 2, "d_ff": 8,
        "n_experts": 1, "top_k": 1, "max_seq_len": 8,
    },
    "data": {"sources": [{"name": "prose"}], "cache_dir": None},
    "schedule": {"stages": [
        {"until_tokens": 6, "seq_len": 3, "batch_tokens": 6},
        {"until_tokens": 20, "seq_len": 7, "batch_tokens": [7, 14]},
    ]},
    "train": {"seed": 0, "eval_every_steps": 1},
    "tracking": "none",
}  # fmt: skip
STEPS = [(3, 6, 2.0), (7, 14, 7.0)]  # seq_len, batch_tokens, tokens_per_second
NATS_AFTER_STEP = {0: 3.0, 1: 2.0, 2: 1.0}


def make_run(folder="runs/a", nats=NATS_AFTER_STEP, steps=STEPS, source="prose", digest="d", **settings) -> RunRecords:
    """Make the records of a run; ``settings`` are dotted keys of the config, with __ for a dot."""
    config = copy.deepcopy(CONFIG)
    for key, value in settings.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    lines, seen = [], 0
    for number, (seq_len, batch_tokens, speed) in enumerate(steps, start=1):
        seen += batch_tokens
        lines.append({"step": number, "tokens_seen": seen, "ce_loss": 1.0, "seq_len": seq_len})
        lines[-1] |= {"batch_tokens": batch_tokens, "tokens_per_second": speed}
    tokens = {0: 0, **{line["step"]: line["tokens_seen"] for line in lines}}
    evaluations = [
        {"step": step, "tokens_seen": tokens[step], f"val/{source}/ce_loss": value}
        | {f"val/{source}/bits_per_byte": None if value is None else value / 2}
        for step, value in nats.items()
    ]
    path = Path(folder)
    return RunRecords(path.name, path, config, lines, [], evaluations, [], [], None, digest, [])


def cells(comparison: Comparison, column: str) -> list[str]:
    """Return a column of the final table by the start of its heading."""
    index = next(i for i, name in enumerate(comparison.final.columns) if name.startswith(column))
    return [row[index] for row in comparison.final.rows]


def picture(comparison: Comparison, name: str) -> Picture:
    """Return a picture by name."""
    return next(picture for picture in comparison.pictures if picture.name == name)


def test_one_run_alone_has_pictures_and_no_differences():
    """A single run is drawn over text, compute and time, and differs in nothing."""
    comparison = compare_runs([make_run()])
    assert [picture.name for picture in comparison.pictures] == ["compare-tokens", "compare-flops", "compare-time"]
    assert comparison.differences.rows == [["(nothing)", ""]]
    assert cells(comparison, "State") == ["finished"]
    assert comparison.notes == []


def test_no_run_is_an_error():
    """There is nothing to compare without a run."""
    with pytest.raises(ValueError, match="at least one run"):
        compare_runs([])


@pytest.mark.parametrize(
    "setting",
    [
        {"train__seed": 1},
        {"train__seed": 1, "train__eval_every_steps": 5, "train__record_tokens": 7, "train__sample_tokens": 0},
        {"train__seed": 1, "data__cache_dir": "/elsewhere", "tracking": "wandb", "checkpoint": {"keep_last": 9}},
    ],
)
def test_runs_that_differ_in_the_seed_are_one_row(setting):
    """The seed, paths and what is recorded do not make another group."""
    comparison = compare_runs([make_run("a"), make_run("b", **setting)])
    assert cells(comparison, "Run") == ["a (2 seeds)"]
    assert cells(comparison, "Seeds") == ["2"]
    assert any("a (2 seeds) stands for a, b" in note for note in comparison.notes)


@pytest.mark.parametrize("setting", [{"model__d_ff": 9}, {"data__validation_tokens": 5}, {"digest": "e"}])
def test_other_settings_make_other_groups(setting):
    """The model, the data and the tokenizer make another group."""
    assert len(compare_runs([make_run("a"), make_run("b", **setting)]).final.rows) == 2


def test_groups_share_a_colour_and_a_label(rendered):
    """Two seeds are drawn in the first colour, another model in the second."""
    comparison = compare_runs([make_run("a"), make_run("b", train__seed=1), make_run("c", model__d_ff=16)])
    svg = picture(comparison, "compare-tokens").svg
    assert all(f">{text}<" in svg for text in ("a (2 seeds)", "Text seen (tokens)", "Validation loss (nats per token)"))
    assert set(re.findall(r"stroke: (#\w{6})", svg)) >= {"#0072b2", "#d55e00"}
    assert "#009e73" not in svg


def test_mean_and_spread_by_hand():
    """Ends at 1, 2 and 6 nats have a mean of 3; steps of 3 + 2 and of 6 + 2 seconds make times of 5, 5 and 8."""
    ends = [{0: 3.0, 2: end} for end in (1.0, 2.0, 6.0)]
    slow = [(3, 6, 1.0), STEPS[1]]
    runs = [make_run(f"r{i}", ends[i], slow if i == 2 else STEPS, train__seed=i) for i in range(3)]
    comparison = compare_runs(runs)
    assert cells(comparison, "prose (nats per token)") == ["3 (1 to 6)"]
    assert cells(comparison, "prose (bits per byte)") == ["1.5 (0.5 to 3)"]
    assert cells(comparison, "Training time (seconds)") == ["6 (5 to 8)"]
    assert cells(comparison, "Text seen (tokens)") == ["20"]


def test_flops_over_a_curriculum_by_hand():
    """A token costs 3 · (336 + 4 (T + 1)): 1056 at T = 3, 1104 at T = 7; so 6 · 1056 and then 14 · 1104 more."""
    comparison = compare_runs([make_run()])  # 64 projections + 4 (T + 1) scores + 192 feed-forward + 80 output
    table = picture(comparison, "compare-flops").table
    assert [(row[2], row[3]) for row in table.rows] == [("0", "3"), ("6336", "2"), ("21790", "1")]
    assert cells(comparison, "Training compute (FLOP)") == ["21790"]
    seconds = [row[2] for row in picture(comparison, "compare-time").table.rows]
    assert seconds == ["0", "3", "5"]


def test_parameters_by_hand():
    """Two experts of 96 parameters, one of them active: a layer's expert less."""
    moe = make_run("b", model__n_experts=2, model__normalize_topk=False)
    total, active = (cells(compare_runs([moe]), name)[0] for name in ("Total", "Active"))
    assert int(total) - int(active) == 96


def test_units_follow_the_size():
    """Large numbers have units with names, and never more than four digits."""
    steps = [(7, 7_000_000_000_007, 1e7), (7, 7_000_000_000_007, 1e7)]
    comparison = compare_runs([make_run(steps=steps)])
    assert cells(comparison, "Text seen (trillion tokens)") == ["14"]
    assert cells(comparison, "Training compute (PFLOP)") == ["15.46"]  # 14e12 · 1104
    assert cells(comparison, "Training time (days)") == ["16.2"]
    assert "ends at 1 after 15.46 PFLOP" in picture(comparison, "compare-flops").alt


def test_other_tokenizers_refuse_nats(rendered):
    """Runs that were tokenised differently have bits per byte everywhere and nats nowhere."""
    comparison = compare_runs([make_run("a"), make_run("b", digest="other")])
    texts = [part for p in comparison.pictures for part in (p.svg, p.alt, *p.table.columns)]
    assert not any("nats" in text for text in (*texts, *comparison.final.columns))
    assert all("bits per byte" in p.svg for p in comparison.pictures)
    assert cells(comparison, "prose (bits per byte)") == ["0.5", "0.5"]
    [note] = comparison.notes
    assert note.startswith("a against b: tokenised differently, so that loss per token cannot be compared")


def test_an_unknown_tokenizer_refuses_nats():
    """What cannot be known to have the same tokens is not compared by them."""
    comparison = compare_runs([make_run("a"), make_run("b", digest=None)])
    assert not any("nats" in name for name in comparison.final.columns)
    assert any("how b was tokenised is not known" in note for note in comparison.notes)


def test_differences_are_only_what_differs():
    """Lists have indices, a ramp differs from a constant, what is missing is said, values are as in YAML."""
    constant = {"stages": [CONFIG["schedule"]["stages"][0], {"until_tokens": 20, "seq_len": 7, "batch_tokens": 14}]}
    runs = [make_run("a"), make_run("b", train__seed=65537, schedule=constant, data__cache_dir="null")]
    table = compare_runs(runs).differences
    assert table.columns == ["Setting", "a", "b"]
    assert table.rows == [
        ["data.cache_dir", "null", "'null'"],
        ["schedule.stages.1.batch_tokens.0", "7", "not there"],
        ["schedule.stages.1.batch_tokens.1", "14", "not there"],
        ["train.seed", "0", "65537"],
        ["schedule.stages.1.batch_tokens", "not there", "14"],
    ]


def test_an_empty_list_is_a_value():
    """An empty list is shown as one where the other run has entries."""
    runs = [make_run("a", data__special=[]), make_run("b", data__special=["x"])]
    assert compare_runs(runs).differences.rows == [
        ["data.special", "[]", "not there"],
        ["data.special.0", "not there", "x"],
    ]


def test_a_stopped_run_is_marked_and_not_averaged():
    """A run that stopped has a row of its own beside the finished run of its group, and a note."""
    stopped = make_run("b", {0: 3.0, 1: 2.0}, STEPS[:1], train__seed=1)
    comparison = compare_runs([make_run("a"), stopped])
    assert cells(comparison, "State") == ["finished", "stopped at 6 of 20 tokens"]
    assert cells(comparison, "prose (nats per token)") == ["1", "2"]
    assert any(note.startswith("b stopped at 6 of 20 tokens") for note in comparison.notes)
    assert "a ends lowest, at 1 after 20 tokens, 1 below b (2 after 6 tokens)" in comparison.pictures[0].alt


def test_seeds_that_came_differently_far_are_two_rows():
    """Two stopped seeds are one row where their tokens differ by 2 % at most, with a look each where by more."""
    lengths = {"a": 100_000, "b": 101_000, "c": 3_000}
    runs = [
        make_run(name, {0: 3.0, 1: 2.0}, [(3, n, 2.0)], train__seed=n, schedule={"stages": [{"until_tokens": 10**6}]})
        for name, n in lengths.items()
    ]
    assert cells(compare_runs(runs), "Run") == ["a (2 seeds)", "c"]


def test_a_run_that_still_trains_is_not_called_stopped():
    """It has a row of its own, which says so."""
    running = dataclasses.replace(make_run("b", {0: 3.0, 1: 2.0}, STEPS[:1], train__seed=1), is_training=True)
    comparison = compare_runs([make_run("a"), running])
    assert cells(comparison, "State") == ["finished", "still training, at 6 of 20 tokens"]
    assert not any("stopped" in note for note in comparison.notes)
    assert any(note.startswith("b is still training") for note in comparison.notes)


def test_the_first_table_says_what_is_lowest():
    """Ends at 1, 2 and 4 nats: the lowest is named, the others are 1 and 3 above it."""
    runs = [make_run(f"r{end}", {0: 5.0, 2: float(end)}, model__d_ff=8 * end) for end in (2, 1, 4)]
    assert cells(compare_runs(runs), "prose: above the lowest (nats per token)") == ["1", "lowest", "3"]
    assert cells(compare_runs([*runs, make_run("none", {}, model__d_ff=40)]), "prose: above")[-1] == "?"


def test_every_run_shows_within_the_axes():
    """A short run beside a long one has its last two points inside the panel."""
    long = [(7, 14, 7.0)] * 20
    runs = [
        make_run("long", {0: 9.0, **{s: 2 - s / 20 for s in range(5, 21)}}, long),
        make_run("short", {0: 8.0, 1: 5.0}),
    ]
    curves = curves_over(QUANTITIES[0], NATS, ["prose"], group_runs(list(map(ComparedRun, runs))))
    with pictures.drawing() as (_, axes):
        _draw_panel(axes, curves.curves, 1.0)
        low, high = axes.get_ylim()
    assert low < 1
    assert 8 < high < 9


def test_scores_from_before_the_end_are_marked():
    """A last loss that is not finite is not passed off as the one before it."""
    comparison = compare_runs([make_run("a", {0: 3.0, 1: 2.0, 2: None})])
    assert cells(comparison, "State") == ["finished, last scored at 6 tokens"]
    assert any("the last loss on prose is not finite" in note for note in comparison.notes)


def test_the_alt_text_has_the_mean_of_seeds():
    """Means of 2 and 3 nats are 1 apart."""
    ends = [(1.0, 0, 8), (3.0, 1, 8), (2.5, 0, 16), (3.5, 1, 16)]
    runs = [make_run(f"r{i}", {2: end}, train__seed=s, model__d_ff=f) for i, (end, s, f) in enumerate(ends)]
    alt = compare_runs(runs).pictures[0].alt
    assert "prose: r0 (2 seeds) on average ends lowest, at 2 after 20 tokens, 1 below r2 (2 seeds) on average (3" in alt


@pytest.mark.parametrize(
    ("model", "problem"),
    [(CONFIG["model"] | {"colour": 3}, "colour"), (CONFIG["model"] | {"head_dim": 3}, "even"), ([], "no model")],
)
def test_an_unreadable_model_is_left_out_of_the_flops(model, problem):
    """A config of another version costs the run its FLOPs and parameters, with a note, and nothing else."""
    comparison = compare_runs([make_run("a"), make_run("b", model=model)])
    assert [{row[1] for row in p.table.rows} for p in comparison.pictures] == [{"a", "b"}, {"a"}, {"a", "b"}]
    assert [cells(comparison, name)[1] for name in ("Total", "Active", "Training compute")] == ["?", "?", "?"]
    assert any("b: parameters and training compute are not known" in n and problem in n for n in comparison.notes)
    assert any(n.startswith("not in the picture over training compute") and n.endswith("b") for n in comparison.notes)


def test_runs_without_a_config_are_not_one_group():
    """Nothing is known of their settings: no group, no column of differences."""
    runs = [make_run("a"), *(make_run(name) for name in "bc")]
    for run in runs[1:]:
        run.config.clear()
    comparison = compare_runs(runs)
    assert cells(comparison, "Seeds") == ["1", "?", "?"]
    assert comparison.differences.columns == ["Setting", "a"]
    assert cells(comparison, "State")[1] == "end of schedule not known"


def test_runs_without_evaluations_are_listed():
    """They are in the tables and in no curve."""
    comparison = compare_runs([make_run("a"), make_run("b", {}, STEPS[:1], model__d_ff=16)])
    assert {row[1] for p in comparison.pictures for row in p.table.rows} == {"a"}
    assert cells(comparison, "prose (nats per token)") == ["1", "?"]
    assert any(re.fullmatch("no evaluations.*curves: b", note) for note in comparison.notes)
    assert compare_runs([make_run(nats={})]).pictures == []


def test_sources_that_are_not_shared_are_noted():
    """Each panel has the runs that were scored on its source."""
    other = make_run("b", source="code", data__sources=[{"name": "code"}])
    comparison = compare_runs([make_run("a"), other])
    assert any("no source in common" in note for note in comparison.notes)
    assert {(row[0], row[1]) for row in comparison.pictures[0].table.rows} == {("prose", "a"), ("code", "b")}


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"data__validation_tokens": 9}, "data.validation_tokens"),
        ({"data__sources": [{"name": "prose", "files": "x"}]}, "data.sources.0.files"),
        ({"schedule": {"stages": [{"until_tokens": 20, "seq_len": 4}]}}, "the longest seq_len"),
    ],
)
def test_other_held_out_text_is_noted(setting, key):
    """Scores of other text, or with another context, are not called comparable."""
    notes = compare_runs([make_run("a"), make_run("b", **setting)]).notes
    assert any(note.startswith("the scored text or its context may differ") and note.endswith(key) for note in notes)


def test_missing_steps_are_noted():
    """Where metrics.jsonl has lost lines, compute and time are said to be too low."""
    run = make_run()
    del run.steps[0]
    assert "only 1 of 2 steps" in compare_runs([run]).notes[0]


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["x/run", "y/run", "y/other"], ["x/run", "y/run", "other"]),
        (["x/p/run", "y/p/run"], ["x/p/run", "y/p/run"]),
        (["x/run", "x/run"], ["run", "run #2"]),
    ],
)
def test_labels_are_the_shortest_that_differ(folders, labels):
    """Equal names get parents, and only they."""
    assert [run.name for run in tell_apart([make_run(folder) for folder in folders])] == labels


@pytest.mark.slow
def test_many_long_names_fit_the_legend(rendered):
    """Names that begin with an underscore, or are longer than the legend is wide, have their entry whole."""
    names = ["_hidden", "long-" * 30 + "name", *(f"run{i}" for i in range(10))]
    runs = [make_run(name, model__d_ff=8 * (i + 1)) for i, name in enumerate(names)]
    svg = picture(compare_runs(runs), "compare-tokens").svg
    assert all(f">{name}<" in svg for name in names if len(name) < 90)
