"""What a report shows of the stages after pre-training: scores, rewards over steps and over the KL, pairs."""

from __future__ import annotations

import re

import numpy as np
import pytest
from made_up_run import make_run, make_step

from moe_gpt.report import before_after, tuning
from moe_gpt.report.missing import NotRecorded
from moe_gpt.report.recorded import RunRecords, Slice
from moe_gpt.report.run_summary import summarise

N = 24
SCORES = {
    "stage": "rl",
    "before": {"parses": {"score": 0.5, "n": 256, "standard_error": 0.03125}},
    "after": {
        "parses": {"score": 0.9375, "n": 256, "standard_error": 0.015},
        "kl": {"score": 1.5, "n": 256, "standard_error": 0.1},
    },
    "forgetting": {"before": {"prose": 3.5}, "after": {"prose": 3.75}},
}


def make_tuned(stage: str, scores: dict | None = None, **values: object) -> RunRecords:
    """Return a run of a stage whose steps have values, each a number or a function of the step."""
    steps = [
        make_step(step, **{key: value(step) if callable(value) else value for key, value in values.items()})
        for step in range(1, N + 1)
    ]
    config = make_run().config | {stage: {"key": 1}}
    return make_run(config=config, steps=steps, stage_scores=SCORES if scores is None else scores)


def make_rl(**changes: object) -> RunRecords:
    """Return a run of reinforcement: the reward rises to 1, the KL to 2.4, and the use of arguments falls to 0."""
    keys = ("length", "entropy", "ended", "distinct", "flat_groups", "several_names")
    values = {"reward": lambda step: step / N, "kl": lambda step: (step - 1) / 10}
    values |= {"parses": lambda step: step / N, "uses_argument": lambda step: 1 - step / N}
    return make_tuned("rl", **{**values, **dict.fromkeys(keys, 0.5), **changes})


def sections_of(page: str) -> list[str]:
    return re.findall(r'<h2 id="([\w-]+)"', page)


def flat(*shares: float) -> str:
    """Return what is said of a run whose last steps have these shares of flat groups, and 0.25 before."""
    at = dict(zip(range(N - len(shares) + 1, N + 1), shares, strict=True))
    return " ".join(tuning.flat_groups(make_rl(flat_groups=lambda step: at.get(step, 0.25))))


def test_scores_are_a_table_with_errors_and_forgetting_another():
    """A score that is not there before has a dash; the rise of a loss is the difference."""
    scores, forgetting = tuning.scores(make_rl())
    assert scores.columns == ("score", "n", "before", "after")
    assert scores.rows == [("parses", 256, "0.500 ± 0.031", "0.938 ± 0.015"), ("kl", 256, "–", "1.500 ± 0.100")]
    assert forgetting.rows == [("prose", 3.5, 3.75, 0.25)]


def test_a_task_that_was_not_run_has_no_row():
    """As scenes have it for digits: its numbers are None."""
    seen = {"score": 0.75, "n": 8, "standard_error": 0.15, "shuffled": 0.0, "blind": 0.1, "random_object": None}
    scores = {"before": {}, "after": {"count": seen, "digits": dict.fromkeys(seen) | {"n": 0}}}
    tables = tuning.tables_of_scores([make_tuned("see", scores=scores)])
    assert [row[0] for table in tables for row in table.rows] == ["count"] * len(tables)
    assert tuning.meanings(make_tuned("see", scores=scores))


def test_scores_of_several_runs_are_in_one_table():
    """The rows of a score are together, with the runs' names; a run of another stage has its own scores."""
    pair = {"score": 0.75, "n": 8, "standard_error": 0.15}
    reward = make_tuned("reward", scores={"before": {"held_out_pairs": pair}})
    runs = [make_rl(), reward, make_rl()]
    (table, _) = tuning.tables_of_scores(runs)
    assert [row[:2] for row in table.rows] == [
        ("parses", "made-up"), ("parses", "made-up"), ("kl", "made-up"), ("kl", "made-up"),
        ("held_out_pairs", "made-up"),
    ]  # fmt: skip
    assert table.rows[-1] == ("held_out_pairs", "made-up", 8, "0.750 ± 0.150", "–")


def test_exact_matches_have_task_and_turn():
    """In a table of their own, in the order of the tasks; other scores stay in theirs."""
    half = {"score": 0.5, "n": 4, "standard_error": 0.25}
    found = {"before": {}, "after": dict.fromkeys(("stops", "second_turn_name", "parameters"), half)}
    exact, others = tuning.tables_of_scores([make_tuned("sft", scores=found)])
    assert exact.columns == ("score", "task", "turn", "n", "before", "after")
    assert exact.rows == [
        ("parameters", "functions", 1, 4, "–", "0.500 ± 0.250"),
        ("second_turn_name", "functions", 2, 4, "–", "0.500 ± 0.250"),
    ]
    assert [row[0] for row in others.rows] == ["stops"]


def answers(**columns: object) -> dict:
    """Return scores with answers to two prompts."""
    rows = [{"prompt": "def f(a):\n    return", **columns, "answer": " <b>\x01\n"}, {"prompt": "x" * 300, "answer": ""}]
    return {"answers_before": [{"prompt": "p", "answer": "old\n\n \nlines"}], "answers_after": rows}


def test_answers_to_fixed_prompts_are_a_table():
    """Long texts are cut, an empty one is said, a prompt that was not asked before has a dash."""
    table = before_after.fixed_answers(make_tuned("rl", scores=answers()))
    assert table.columns == ("prompt", "before", "after")
    assert table.rows == [
        ("def f(a):\n    return", "old\nlines", "<b>␁"),
        ("x" * 159 + "…", None, "(nothing)"),
    ]
    table = before_after.fixed_answers(make_tuned("sft", scores=answers(task="functions", turn=1, expected="a")))
    assert table.columns == ("task", "turn", "prompt", "expected", "before", "after")
    assert table.rows[0][:4] == ("functions", 1, "def f(a):\n    return", "a")
    with pytest.raises(NotRecorded, match="learns from conversations of files"):
        before_after.fixed_answers(make_tuned("sft"))


def test_answers_on_the_page_are_escaped(page_of):
    """And said to be greedy or sampled, where there are any."""
    page = page_of(make_rl(), make_rl())
    assert 'class="texts"' not in page
    page = page_of(make_tuned("rl", scores=answers()))
    assert ">&lt;b&gt;␁</td>" in page
    assert "Answers are sampled" in page
    assert "Answers are" not in page_of(make_rl())
    assert "the model&#39;s scores of the better" in page_of(make_tuned("reward", scores=answers(rejected="b")))


def slice_of(*choices: list[list[int]]) -> Slice:
    """Return two tokens with their two experts in each layer."""
    return Slice(np.array([[7, 8]]), np.array(choices)[:, None])


def test_routing_before_and_after_is_of_the_same_tokens():
    """By hand: of layer 0 no choice changed but the order, of layer 1 one of four; other texts have columns."""
    both = {
        "before": slice_of([[0, 1], [2, 3]], [[0, 1], [0, 1]]),
        "after": slice_of([[1, 0], [2, 3]], [[0, 1], [0, 2]]),
    }
    run = make_run(config=make_rl().config, stage_routing=both)
    table = before_after.routing_change(run)
    own, prose = "changed: prompts and answers (%)", "changed: prose (%)"
    assert table.columns == (
        "layer",
        own,
        prose,
        "changed: code (%)",
        "busiest expert before",
        "busiest expert after",
    )
    assert [row[1] for row in table.rows] == [0, 25]
    assert [row[4:] for row in table.rows] == [(1, 1), (2, 2)]
    assert 0 < table.rows[0][2] < 100
    picture = before_after.draw_routing_change(run)
    assert picture.table.columns == ("layer", "expert", "before (%)", "after (%)")
    assert picture.table.rows[5:7] == [(1, 1, 50.0, 25.0), (1, 2, 0.0, 25.0)]
    assert "of 2 tokens of held-out prompts and answers" in picture.caption


def test_routing_of_other_tokens_is_not_compared():
    """Nor is a single evaluation compared with itself."""
    run = make_run(config=make_rl().config)
    other = {"before": slice_of([[0, 1]] * 2), "after": Slice(np.array([[7, 9]]), np.zeros((1, 1, 2, 2), int))}
    with pytest.raises(NotRecorded, match="are not recorded"):
        before_after.routing_change(make_run(config=run.config, arrays=run.arrays[:1], stage_routing=other))
    with pytest.raises(NotRecorded, match="are not recorded"):
        before_after.routing_change(make_run(config=run.config, arrays=run.arrays[1:]))


def test_steps_are_drawn_as_means_of_a_twelfth():
    """24 steps: means of the newest two, the first one alone."""
    steps, values = tuning._over_steps(make_rl(), "reward")
    np.testing.assert_array_equal(steps, np.arange(1, N + 1))
    np.testing.assert_allclose(values, [1 / N, *(np.arange(2, N + 1) - 0.5) / N])


def test_rules_over_the_kl_begin_with_the_first_step():
    """KL and rule are means of the same steps, and the first step is a point of its own."""
    kl, values = tuning._over_kl(make_rl(), "uses_argument")
    np.testing.assert_allclose(kl, [0.0, *np.arange(0.05, 2.4, 0.2)])
    np.testing.assert_allclose(values, [1 - 1 / N, *(1 - (np.arange(1, N, 2) + 0.5) / N)])


@pytest.mark.slow
def test_reinforcement_has_three_pictures():
    """Every recorded value is in one of them; the words say where the lines begin and end."""
    drawn = {picture.name: picture for picture in tuning.draw_reinforcement(make_rl())}
    assert list(drawn) == ["reinforcement", "rules", "over-kl"]
    panels = {name: list(dict.fromkeys(row[0] for row in picture.table.rows)) for name, picture in drawn.items()}
    assert panels["reinforcement"] == ["reward", "KL", "length", "entropy", "ended", "distinct", "flat groups"]
    assert panels["over-kl"] == ["reward", "the line parses", "it uses an argument", "it has several names"]
    assert "It uses an argument, share of answers, from the first to the last value: made-up 0.9583 to 0.02083." in (
        drawn["over-kl"].alt
    )
    assert "means of the newest 2 steps" in drawn["rules"].caption


def make_proxy(name: str = "proxy", gold: float = 0.5) -> RunRecords:
    """Return a run that a reward model rewards, whose answers used an argument in a share of cases at the start."""
    run = make_rl()
    score = {"score": gold, "n": 8, "standard_error": 0.1}
    scores = {"before": {"uses_argument": score, "parses": score | {"score": 0.8}}}
    config = run.config | {"rl": {"reward_model": "runs/reward"}}
    return make_run(name=name, config=config, steps=run.steps, stage_scores=scores)


def test_a_reward_model_is_drawn_against_a_rule():
    """In one panel and one unit: at 0.5, the deviation of a share is 0.5."""
    names = [picture.name for picture in tuning.draw_reinforcement(make_proxy())]
    assert names == ["reinforcement", "rules", "proxy", "over-kl"]
    proxy, parses, gold = tuning._proxy_and_rules(make_proxy()).values()
    np.testing.assert_allclose(gold.values, 2 * (tuning._over_kl(make_rl(), "uses_argument").values - 0.5))
    np.testing.assert_allclose(parses.values, 2.5 * (tuning._over_kl(make_rl(), "parses").values - 0.8))
    np.testing.assert_allclose(proxy.values, tuning._over_kl(make_rl(), "reward").values)
    picture = tuning.draw_reinforcement([make_proxy(), make_proxy("twin"), make_rl()])[2]
    assert {row[0] for row in picture.table.rows} == {"proxy", "twin"}
    assert (
        "Proxy, standard deviations, from the first to the last value: proxy: the reward model's score" in picture.alt
    )


def test_a_rule_that_never_or_always_holds_has_no_unit():
    """There is no deviation to divide by."""
    names = [picture.name for picture in tuning.draw_reinforcement(make_proxy(gold=0.0))]
    assert names == ["reinforcement", "rules", "over-kl"]


def test_without_a_measured_kl_there_is_no_picture_over_it():
    """A KL of 0 in every step was not measured, which the caption says."""
    without = make_rl(kl=0.0)
    names = [picture.name for picture in tuning.draw_reinforcement(without)]
    assert names == ["reinforcement", "rules"]
    assert "was not measured" in tuning.draw_reinforcement(without)[0].caption
    assert "was not measured" not in tuning.draw_reinforcement(make_rl())[0].caption


def test_rewards_of_prompts_from_files_have_no_rules():
    """Only what every step has is drawn."""
    run = make_rl(parses=None, uses_argument=None, several_names=None)
    names = {picture.name: picture for picture in tuning.draw_reinforcement(run)}
    assert list(names) == ["reinforcement", "over-kl"]
    assert {row[0] for row in names["over-kl"].table.rows} == {"reward"}


def test_twin_runs_share_the_panels():
    """Each run is a line with its name."""
    twin = make_run(name="twin", config=make_rl().config, steps=make_rl(kl=lambda step: step / 5).steps)
    (_, _, over_kl) = tuning.draw_reinforcement([make_rl(), twin])
    assert over_kl.table.columns == ("quantity", "KL (nats per answer)", "made-up", "twin")


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_pairs_have_their_own_picture(stage):
    """It has accuracy and loss, and none of reinforcement."""
    run = make_tuned(stage, pair_accuracy=0.75)
    (picture,) = tuning.draw_preferences(run)
    assert {row[0] for row in picture.table.rows} == {"pairs in the right order", "loss"}
    assert tuning.draw_reinforcement(run) == tuning.flat_groups(run) == []


def test_flat_groups_are_said_in_words():
    """Few at the end, most from a step on, and all of them in every step."""
    assert flat(0.5, 0.5) == (
        "At the end, 50 % of the groups were flat: all answers to the prompt had the same reward, so nothing was "
        "learned from them."
    )
    assert flat(1.0, 1.0, 0.5, 0.5).startswith("At the end, 50 %")
    assert flat(0.9, 1.0, 0.875, 1.0, 1.0).startswith("From step 21 on almost nothing was learned")
    assert flat(1.0, 1.0, 1.0, 0.9).startswith("From step 22 on almost nothing was learned")
    assert "no answer to a prompt was ever better" in flat(*[1.0] * N)
    assert "no answer to a prompt was ever better" not in flat(*[1.0] * (N - 1), 0.9)


def test_page_of_a_stage_has_its_sections(page_of):
    """They come after the summary; a page about pre-training has none of them."""
    first, last = ["summary", "tuning", "answers"], ["routing-change", "loss"]
    assert sections_of(page_of(make_rl()))[:6] == [*first, "reinforcement", *last]
    pairs = page_of(make_tuned("dpo", pair_accuracy=0.5))
    assert sections_of(pairs)[:6] == [*first, "preferences", *last]
    tuned = {"tuning", "answers", "reinforcement", "preferences", "routing-change"}
    assert not tuned & set(sections_of(page_of(make_run())))
    page = page_of(make_rl())
    assert "parses: the share of lines that are Python and return something." in page
    assert "A reward model is worth" not in page
    assert "is a tie" not in page


def test_meanings_say_what_a_score_of_pairs_is_worth():
    """A reward model is compared with the shorter answer, and DPO begins with ties."""
    pairs = {"after": {"held_out_pairs": {"score": 0.75, "n": 8, "standard_error": 0.15}}}
    reward, dpo = (tuning.meanings(make_tuned(stage, scores=pairs))[-1] for stage in ("reward", "dpo"))
    assert reward.startswith("A reward model is worth")
    assert "every pair is a tie" in dpo


@pytest.mark.slow
def test_page_does_not_miss_what_a_stage_never_records(page_of):
    """Steps of rewards and pairs record no norms and no routing, and configs of stages sample no text."""
    page = page_of(make_run(config=make_rl().config, steps=make_rl().steps, records=[], stage_scores=answers()))
    assert "Not shown" not in page
    assert "Is the router healthy?" not in page
    assert not {"norms", "samples"} & set(sections_of(page))
    assert "Not shown" in page_of(make_run(config=make_tuned("sft").config, records=[]))


def test_reward_model_has_no_sections_on_text_and_experts(page_of):
    """It predicts no tokens, so nothing is missing."""
    run = make_tuned("reward", pair_accuracy=0.75)
    page = page_of(run)
    assert not {"loss", "positions", "samples", "load", "routing"} & set(sections_of(page))
    assert [finding.short for finding in summarise(run)][-1] == "No"


def test_summary_says_what_the_stage_changed():
    """The first score before and after; without scores, why there are none."""
    found = {finding.question: finding for finding in summarise(make_rl())}
    assert found["What did the stage change?"].short == "parses: 0.500 before, 0.938 after"
    assert "Did it learn?" not in found
    unfinished = {finding.question: finding for finding in summarise(make_tuned("sft", scores={}))}
    assert unfinished["What did the stage change?"].short == "Not known"
    assert "an unfinished run has none" in unfinished["What did the stage change?"].because[0]


def test_experts_of_a_stage_are_judged_from_its_first_step_on():
    """Its routers are trained already; of pre-training it would be too early, which one paragraph says."""
    config = make_rl().config | {"faults": {"routing_window": 100}}
    stage, base = (make_run(config=given) for given in (config, config | {"rl": None}))
    found = [{finding.question: finding for finding in summarise(run)} for run in (stage, base)]
    question = "Are the experts used?"
    assert [answers[question].short for answers in found] == ["Yes, all of them", "Too early to say"]
    assert any("from step 100 on (faults.routing_window). So far" in text for text in found[1][question].because)


def test_page_of_several_runs_has_all_scores(page_of):
    """One table, before the curves; runs of pre-training have no part in it."""
    twin = make_run(name="twin", run_dir=make_rl().run_dir / "twin", config=make_rl().config, stage_scores=SCORES)
    found = sections_of(page_of(make_rl(), twin, make_run(name="base", run_dir=make_rl().run_dir / "base")))
    assert found[:4] == ["comparison", "tuning", "reinforcement", "curves"]
    assert "tuning" not in sections_of(page_of(make_run(), make_run(name="second")))


@pytest.mark.parametrize(
    "spoilt",
    [
        {"after": {"parses": {"score": "high"}}},
        {"before": 3, "after": [], "forgetting": {"after": 1}},
        {"forgetting": {"before": {"prose": None}, "after": {"prose": None}}},
    ],
)
def test_damaged_scores_cost_their_section_only(page_of, spoilt):
    """Values of any kind are survived, also those of steps."""
    run = make_tuned("rl", scores=spoilt, reward="x", kl="y", flat_groups=[1])
    assert "Did anything go wrong?" in page_of(run)
