"""A run's page: what it says, that it stands alone, and that it survives whatever a run lacks."""

import copy
import dataclasses
import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from made_up_run import MODEL, L, make_arrays, make_evaluation, make_record, make_run, make_step

from moe_gpt.errors import InputError
from moe_gpt.report import pictures
from moe_gpt.report.recorded import RunRecords
from moe_gpt.report.report import write_report
from moe_gpt.report.run_summary import summarise

REPOSITORY = Path(__file__).parents[2]
VOID = {"meta", "input", "br", "link", "img"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Write the report of a run that has everything."""
    path = tmp_path_factory.mktemp("whole") / "report.html"
    write_report([make_run()], path)
    return path


class Balance(HTMLParser):
    """Checks that every element is closed in order, and keeps the body's text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        """Remember what is open."""
        self.open += [tag] * (tag not in VOID)

    def handle_endtag(self, tag):
        """Close what was opened last."""
        assert self.open.pop() == tag, f"</{tag}> closes something else at {self.getpos()}"

    def handle_data(self, data):
        """Keep text, and the borders of cells."""
        self.text += f" {data}" if "body" in self.open else ""


def text_of(page: str) -> str:
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    return " ".join(parser.text.split())


def found(run: RunRecords, word: str) -> tuple[str, str]:
    """Return the answer to the question with this word, in short and in full."""
    (finding,) = [finding for finding in summarise(run) if word in finding.question]
    return finding.short, " ".join(finding.because)


def not_shown(page: str) -> list[str]:
    """Return what the page says is missing."""
    return re.findall(r'class="missing">Not shown: (.*?)</p>', page)


def pictures_of(page: str) -> list[str]:
    """Return the names of the page's pictures."""
    return re.findall(r'<figure id="([\w-]+)">', page)


def test_report_answers_what_a_reader_asks_first(whole):
    """Did it learn, are the experts used, do they differ between sources, is the router healthy."""
    run, text = make_run(), text_of(whole.read_text())
    findings = summarise(run)
    assert all(f"{finding.question} {finding.short} {finding.because[0]}" in text for finding in findings)
    assert [finding.short for finding in findings[1:5]] == ["Yes", "Yes, all of them", "Clearly", "No problem found"]
    assert "prose and code" in findings[3].question


def test_answers_have_their_numbers():
    """Loss and perplexity of each source, the loss of guessing, the busiest expert, the text seen: by hand."""
    run = make_run()
    assert found(run, "trained")[0] == "3k tokens in 30 steps"
    learned = found(run, "learn")[1]
    assert re.search(r"prose: 2\.000 nats .*perplexity 7\.389, 1 bits per byte.*3\.912 .*first", learned)
    assert re.search(r"ln\(vocabulary\).* 3\.912 nats", learned)  # ln 50
    assert re.search(r"\b1 to 1\.5 times .*layer 1\b", found(run, "used")[1])


def test_whole_run_has_every_section(whole):
    """Nothing is missing where everything is recorded."""
    page = whole.read_text()
    assert "Not shown" not in page
    pictures = re.findall(r'<figure id="([\w-]+)">', page)
    assert pictures == [
        "losses", "schedule", "load", "load-over-training", "violation", "entropies", "router", "router-gradient",
        "saturation", "co-activation", "domains", "loss-by-position", "norms", "speed",
    ]  # fmt: skip


def test_report_needs_nothing_but_itself(whole):
    """No address is fetched: the only ones are the names of SVG's namespaces; there are no scripts."""
    page = whole.read_text()
    rest = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[\w/]+"', "", page)
    assert "http" not in rest
    assert not re.search(r"<script|<link|<iframe|\ssrc=|@import|url\((?!#)", rest)


def test_every_picture_has_words_and_numbers(whole):
    """Each picture has an alternative text and a table that opens."""
    figures = re.findall(r"<figure.*?</figure>", whole.read_text(), flags=re.DOTALL)
    for figure in figures:
        assert re.search(r'role="img" aria-label="[^"]{20,}"', figure)
        assert re.search(r"<details>.*<tbody>\s*<tr><td", figure, flags=re.DOTALL)


def test_pictures_stand_alone_beside_the_report(whole):
    """Each picture is also an SVG with colours of its own, and a PNG."""
    folder = whole.parent / "report-pictures"
    names = {path.stem for path in folder.iterdir()}
    assert {path.suffix for path in folder.iterdir()} == {".svg", ".png"}
    assert {"losses", "domains"} <= names
    for name in names:
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert "var(" not in svg
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_layers_can_be_picked_without_a_script(whole):
    """Each picker has a radio button for each layer, the first one checked."""
    page = whole.read_text()
    for name in ("favourites", "routed"):
        buttons = re.findall(rf'<input type="radio" name="{name}"[^>]*>', page)
        assert len(buttons) == L
        assert [" checked" in button for button in buttons] == [True, False]


def test_routed_text_has_the_colour_of_the_first_expert(whole):
    """A token's colour is its first expert, its tooltip has all of them in order."""
    tokens = re.findall(r'<b class="e(\d+)" title="(\d+), then (\d+)">', whole.read_text())
    first = make_run().arrays[-1].slices["prose"].choices[0, 0]
    assert [(int(best), int(second)) for _, best, second in tokens[: len(first)]] == [tuple(pair) for pair in first]
    assert all(colour == best for colour, best, _ in tokens)


def test_hostile_texts_are_escaped(page_of):
    """Source names, samples, tokens and events may contain anything."""
    name = '<script>alert("1")</script>$x$'
    run = make_run(sources=(name, "code"))
    run.events.append({"kind": "<script>", "step": 3, "why": "<script>alert(3)</script>\x01"})
    page = page_of(dataclasses.replace(run, name="<script>run"))
    assert "<script" not in page
    assert "\x01" not in page
    assert "&lt;script&gt;alert(2)" in page  # a token
    assert name in text_of(page)


def test_hostile_source_name_is_escaped_in_real_pictures(rendered):
    """SVG text is escaped by matplotlib, and dollars are no mathematics."""
    from moe_gpt.report.run_pictures import draw_losses

    svg = draw_losses(make_run(sources=("<script>$\\frac$",))).svg
    assert "<script" not in svg
    assert "&lt;script&gt;$\\frac$" in svg


def test_run_without_anything_says_what_is_missing(page_of):
    """A run that was interrupted before its first step has a report."""
    empty = {name: [] for name in ("steps", "records", "evaluations", "events", "arrays")}
    run = make_run(**empty, config={}, tokenizer=None, notes=["config.yaml cannot be read: gone"])
    assert [found(run, word)[0] for word in ("learn", "used", "differ", "healthy")] == ["Not known"] * 4
    assert "config.yaml cannot be read: gone" in found(run, "wrong")[1]
    page = page_of(run)
    assert pictures_of(page) == []
    assert len(not_shown(page)) > 15


def test_unfinished_run_says_how_far_it_came(page_of):
    """Steps without evaluations and records give the training pictures, and the share of the plan."""
    run = make_run(evaluations=[], records=[], arrays=[], steps=[make_step(step) for step in range(1, 4)])
    assert re.search(r"\b10 % .*not finished", found(run, "trained")[0])
    assert pictures_of(page_of(run)) == ["losses", "schedule", "speed"]


@pytest.mark.slow
def test_single_evaluation_claims_no_change(page_of):
    """One evaluation is compared with guessing, not with itself; saturation needs two."""
    run = make_run(evaluations=[make_evaluation(30, 2.0)], arrays=[make_arrays(30, 2.0)])
    short, because = found(run, "learn")
    assert short == "Yes"
    assert "only one evaluation" in because
    assert any("two evaluations" in text for text in not_shown(page_of(run)))


def test_health_is_not_judged_too_early():
    """A router about which little is recorded is not called healthy, and one without config is not judged."""
    early = make_run(config=make_run().config | {"faults": {"routing_window": 500}})
    short, because = found(early, "healthy")
    assert short == "Too early to say"
    assert re.search(r"\b6 recorded .* neither .* 300\b", because)
    assert found(make_run(config={}), "healthy")[0] == "Not known"


def test_nothing_alarms_before_it_can_be_judged():
    """Experts without tokens are no alarm before faults.routing_window steps, nor is an untrained model."""
    arrays = make_arrays(30, 2.0)
    for counts in arrays.tokens_per_expert.values():
        counts[1] = [100, 100, 100, 0]
    early = make_run(arrays=[arrays], config=make_run().config | {"faults": {"routing_window": 500}})
    for word in ("used", "differ", "healthy"):
        assert found(early, word)[0] == "Too early to say"
    assert re.search(r"step 30\b.* step 500\b.* 1 of 8 experts has less", found(early, "used")[1])
    assert found(make_run(evaluations=[make_evaluation(0, 4.0)]), "learn")[0] == "Too early to say"


def test_terms_are_explained_once(whole, page_of):
    """Each where it first stands, below its paragraph: the page explains at least ten, a comparison those it has."""
    page = whole.read_text()
    terms = re.findall("<dfn>(.*?)</dfn>", page)
    assert len(terms) == len(set(terms)) >= 10
    for term in ("expert", "router", "nat", "perplexity", "bits per byte", "held-out", "load", "entropy"):
        first = re.search(rf"\b{term}", text_of(page), re.IGNORECASE)
        assert first.start() <= text_of(page).index(text_of(f"<body><dfn>{term}</dfn></body>") + " ")
        assert term in terms
    assert "<dfn>nat</dfn>" in page_of(make_run(), make_run(name="second"))


def test_commands_can_be_copied(page_of):
    """A command is code on a line of its own, with the run's folder and the width of the same active size."""
    commands = re.findall(r'<pre class="command"[^>]*><code>(.*?)</code></pre>', page_of(make_run()))
    train, compare = commands
    assert train.startswith("moe-gpt train made-up/config.yaml --run-dir made-up-dense ")
    assert train.endswith(" model.n_experts=1 model.top_k=1 model.d_ff=32")
    assert compare.startswith("moe-gpt report made-up made-up-dense")


def test_run_that_still_trains_is_not_called_finished_or_not():
    """Its share of the plan stands beside the fact that it goes on."""
    run = make_run(steps=[make_step(step) for step in range(1, 4)], evaluations=[], is_training=True)
    assert re.search(r"\b10 % .*still training$", found(run, "trained")[0])


def test_what_is_long_says_that_it_scrolls(whole):
    """Every picture on a phone, wide tables, and tall ones that are closed; nobody needs a pointer to read."""
    page = whole.read_text()
    assert page.count("The picture scrolls") == page.count("<figure")
    assert re.search(r"The table scrolls sideways: \d+ columns", page)
    assert re.search(r"The table scrolls: \d\d rows", page)
    assert re.search(r'<span class="hover">[^<]*pointer', page)


def test_text_of_pictures_is_readable_on_a_phone(whole):
    """However narrow the page, a picture keeps so much of its own width that its text has 11 pixels."""
    page = whole.read_text(encoding="utf-8")
    kept = float(re.search(r"min-width: calc\(([.\d]+) \* var\(--width\)\)", page)[1])
    sizes = [float(size) for size in re.findall(r"<text style=\"font[^;]*?([\d.]+)px", page)]  # of a viewBox in points
    widths = re.findall(r'<svg [^>]*style="--width: [\d.]+pt"', page)
    assert len(widths) == page.count("<svg") == page.count("<figure")
    axis_text = pictures._STYLE["matplotlib"]["font.size"]
    assert axis_text in sizes
    assert kept * axis_text * 96 / 72 > 11
    assert kept * min(sizes) * 96 / 72 > 9


def test_run_that_did_not_learn_is_told_so():
    """A loss at ln(V) is no learning; learning from one of two sources is half of it."""
    run = make_run(evaluations=[make_evaluation(0, 3.95), make_evaluation(30, 3.9)])
    assert found(run, "learn")[0] == "Not yet"
    run.evaluations[1]["val/code/ce_loss"] = 2.0
    assert found(run, "learn")[0] == "On some sources only"


def test_missing_arrays_leave_the_rest(page_of):
    """Without arrays, routing over training is still drawn, and the sections on text say why they are not."""
    run = make_run(arrays=[], notes=["step_00000030.safetensors cannot be read: damaged"])
    assert "step_00000030.safetensors cannot be read: damaged" in found(run, "wrong")[1]
    page = page_of(run)
    assert any("how many tokens each expert gets" in text for text in not_shown(page))
    assert {"load-over-training", "violation"} <= set(pictures_of(page))
    assert not {"load", "saturation", "co-activation", "domains"} & set(pictures_of(page))


def test_arrays_of_other_shapes_and_nan_are_survived(page_of):
    """Arrays that do not fit together cost their section only."""
    arrays = make_arrays(30, 2.0)
    broken = dataclasses.replace(
        arrays,
        nats={"prose": np.ones(3)},
        tokens_per_expert={"prose": np.ones((L, 4)), "code": np.full((3, 7), np.nan)},
        slices={"prose": dataclasses.replace(arrays.slices["prose"], choices=np.zeros((L, 1, 2, 2), np.uint8))},
    )
    page = page_of(make_run(arrays=[broken]))
    assert any("cannot be read" in text for text in not_shown(page))
    assert "losses" in pictures_of(page)


def test_dense_run_leaves_routing_out_in_one_sentence(page_of):
    """A dense model has no routing to show, and nothing about it is called missing."""
    records = [{key: value for key, value in make_record(5).items() if key != "routing"}]
    config = make_run().config | {"model": MODEL | {"n_experts": 1, "top_k": 1}}
    run = make_run(config=config, records=records, arrays=[])
    assert not any("expert" in finding.question for finding in summarise(run))
    page = page_of(run)
    assert page.count("The model is dense") == 1
    assert "Text with its experts" not in page
    assert not any("expert" in text for text in not_shown(page))


def test_other_versions_are_read_as_far_as_possible(page_of):
    """Unknown keys are passed over, missing ones cost their section only."""
    run = make_run(config=make_run().config | {"model": MODEL | {"from_the_future": 1}, "faults": None, "new": [1]})
    for record in run.records:
        del record["routing"]["token_entropy"]
    page = page_of(run)
    assert "4 experts of which each token uses 2" in found(run, "trained")[1]
    assert any("of a token&#39;s probabilities" in text for text in not_shown(page))
    assert "router" in pictures_of(page)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: [line.update(ce_loss="high", routing=None, groups=1) for line in [*run.steps, *run.records]],
        lambda run: [line["routing"].update(load=[[1], [1, 2]], max_violation="x") for line in run.records],
        lambda run: [line.update({"samples": 3, "val/prose/ce_loss": []}) for line in run.evaluations],
        lambda run: run.config.update(data={"sources": [{}]}, faults={"x": 1}),
        lambda run: run.config.update(model={"n_experts": -4}, schedule={"stages": [{"until_tokens": "soon"}, 3]}),
        lambda run: run.events.extend([{"step": 1, "kind": ["?"], "time": 5}, {"step": 2}]),
        lambda run: setattr(run.tokenizer, "decode", lambda tokens: 1 / 0),
    ],
)
def test_nothing_in_a_run_stops_the_report(page_of, spoil):
    """Values of any kind cost their section only."""
    run = make_run(config=copy.deepcopy(make_run().config))
    spoil(run)
    assert "Did anything go wrong?" in text_of(page_of(run))


def test_trouble_is_in_the_summary_and_the_events(page_of):
    """Skipped steps, dropped tokens, resumes and warnings are told at the top and listed below."""
    run = make_run()
    run.steps[6] = make_step(7, skipped=True, ce_loss=None)
    run.steps[7] = make_step(8, dropped_fraction=0.3)
    run.events.extend([{"kind": "resume", "step": 4}, {"kind": "loss_spike", "step": 9, "message": "ce_loss is high"}])
    short, because = found(run, "wrong")
    assert short == "See below"
    for text in (r"\b1 step skipped.* step 7\b", r"dropped 1 %", r"resumed 1 time\b", r"events: 1 \(loss_spike\)"):
        assert re.search(text, because)
    rows = text_of(page_of(run)).partition("Everything that happened")[2]
    assert re.search("4 resume .*7 skipped step .*9 loss spike message: ce_loss is high", rows)


def test_quiet_runs_are_said_to_be_quiet():
    """Where nothing happened, that is the answer."""
    assert found(make_run(), "wrong")[0] == "No"


def test_dead_experts_are_named():
    """Experts without tokens are told by layer, and the router's check tells what to try."""
    arrays = make_arrays(30, 2.0)
    for counts in arrays.tokens_per_expert.values():
        counts[1] = [100, 100, 100, 0]
    run = make_run(arrays=[arrays])
    for record in run.records:
        record["routing"]["load"][1] = [1.4, 1.3, 1.3, 0.0]
    short, because = found(run, "used")
    assert "1 of 8" in short
    assert "layer 1: 3." in because
    short, because = found(run, "healthy")
    assert short == "1 problem found"
    assert re.search(r"Layer 1: experts 3 of 4 .*load_balancing_loss_weight", because)


def test_several_runs_are_compared_and_summarised(page_of):
    """The comparison comes first, then each run in words."""
    first, second = make_run(), make_run(name="second")
    text = text_of(page_of(first, second))
    assert text.index("At the end") < text.rindex("Run made-up") < text.rindex("Run second")
    assert text.count("Did it learn?") == 2


def test_runs_of_the_same_name_are_told_apart(page_of):
    """In title, navigation, table and headings."""
    runs = [make_run(name="tiny", run_dir=Path(folder) / "tiny") for folder in "ab"]
    page = page_of(*runs)
    assert "<title>Runs a/tiny, b/tiny</title>" in page
    for name in ("a/tiny", "b/tiny"):
        assert re.search(rf'<a href="#run-\d">Run {name}</a>', page)
        assert re.search(rf'<h2 id="run-\d">Run {name}</h2>', page)
    assert not re.search(r"\bRun tiny\b", page)


def test_no_run_is_an_error(tmp_path):
    """There is nothing to report about nothing."""
    with pytest.raises(InputError, match="at least one run"):
        write_report([], tmp_path / "report.html")


def run_script(*arguments: str) -> int:
    with (
        mock.patch.object(sys, "argv", ["report.py", *arguments]),
        pytest.raises(SystemExit) as exit_,
    ):
        runpy.run_path(str(REPOSITORY / "scripts/report.py"), run_name="__main__")
    return exit_.value.code


def test_script_writes_into_the_run_folder(page_of, tmp_path, capsys):
    """Without --out the page is RUN/report.html; notes about the run are printed."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(make_step(step)) for step in range(1, 9)))
    assert run_script(str(run)) == 0
    assert (run / "report.html").is_file()
    assert "run: no evaluation" in capsys.readouterr().out


def test_script_refuses_what_is_no_page(tmp_path, capsys):
    """--out names an HTML file."""
    assert run_script(str(tmp_path), "--out", str(tmp_path / "page.pdf")) == 2
    assert "page.pdf" in capsys.readouterr().err
