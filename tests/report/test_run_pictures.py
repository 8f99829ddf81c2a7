"""The pictures of one run: the numbers behind them by hand, and what they say of what is missing."""

import dataclasses
import io
import math

import numpy as np
import pytest
from made_up_run import E, L, T, make_arrays, make_run, make_step
from matplotlib import image

from moe_gpt.measure.positions import position_buckets
from moe_gpt.report import expert_pictures, pictures, router_pictures, run_pictures
from moe_gpt.report.missing import NotRecorded
from moe_gpt.report.pictures import Table
from moe_gpt.report.routed_text import favourite_tokens, routed_samples, show_controls, show_token
from moe_gpt.report.run_pictures import mean_by_position
from moe_gpt.report.series import Series, spread
from moe_gpt.terminal.numbers import format_count, format_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "inf"),
        ("a < b", "a < b"),
        (0, "0"),
        (1234567, "1,234,567"),
        (0.5, "0.5"),
        (3.14159, "3.142"),
        (12.3456, "12.35"),
        (1234.56, "1235"),
        (123456.7, "123,457"),
        (0.000012345, "1.23e-05"),
        (-0.25, "-0.25"),
        (np.float64(7.0), "7"),
    ],
)
def test_numbers_have_four_digits(value, text):
    """Fractions keep four significant digits, whole numbers all of theirs."""
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (850, "850"), (12345, "12.3k"), (999_900, "1M"), (4.72e6, "4.72M"), (1.8e9, "1.8B")]
)
def test_counts_have_three_digits(value, text):
    """A count is written with a letter for its size."""
    assert format_count(value) == text


def test_moving_mean_looks_back():
    """Each value is the mean of the newest, of fewer at the start."""
    series = Series(np.arange(4.0), np.array([1.0, 3.0, 5.0, 7.0]))
    assert series.smoothed(2).values.tolist() == [1, 2, 4, 6]


def test_shorten_keeps_the_mean_and_the_end():
    """A long line becomes means of equal parts that end where it ends."""
    x, y = Series(np.arange(2400.0), np.arange(2400.0)).shortened()
    assert len(x) == 1200
    assert x[-1] == 2399
    assert y[0] == 0.5


@pytest.mark.parametrize(("n", "limit", "indices"), [(0, 3, []), (1, 3, [0]), (3, 8, [0, 1, 2]), (9, 3, [0, 4, 8])])
def test_spread_has_both_ends(n, limit, indices):
    """Of many, the first and the last are among those chosen."""
    assert spread(n, limit) == indices


def test_position_means_by_hand():
    """Nats over counts, in parts that double; nan where nothing was scored."""
    arrays = dataclasses.replace(
        make_arrays(1, 1.0), nats={"prose": np.full(T, 6.0)}, counts={"prose": np.repeat([2, 0], [64, T - 64])}
    )
    first, second = mean_by_position(arrays, "prose", position_buckets(T))
    assert first == 3
    assert math.isnan(second)


def test_stages_are_described_once_and_numbered():
    """Each stage has its end, length and batch in the caption of the schedule, which others name."""
    text = run_pictures.draw_schedule(make_run()).caption
    assert "1 until 1k: sequences of 40 tokens, 40 tokens a step" in text
    assert "2 until 3k: sequences of 80 tokens, 80 to 160 tokens a step" in text
    for draw in (run_pictures.draw_speed, run_pictures.draw_losses):
        assert "sequences of" not in draw(make_run()).caption
        assert "schedule" in draw(make_run()).caption
        assert "stage" not in draw(make_run(config={})).caption


def test_two_points_are_no_line():
    """Few points have dots; a line between two of them would suggest what nobody has measured."""
    assert pictures.marks(2) == {"marker": "o", "markersize": 3, "linestyle": "none"}
    assert pictures.marks(3) == {"marker": "o", "markersize": 3}
    assert pictures.marks(21) == {}


def test_wide_tables_are_known():
    """A word or a number cannot be broken: the widest of each column counts, and two more."""
    table = Table(("layer", "largest of all"), [(1, 0.5), (1234567, "few words")])
    assert table.n_characters == len("1,234,567") + 2 + len("largest") + 2


def test_stages_not_reached_are_not_drawn(rendered):
    """A run that stopped in its first stage has no line at its end."""
    whole = run_pictures.draw_losses(make_run()).svg
    short = run_pictures.draw_losses(make_run(steps=[make_step(1), make_step(2)], evaluations=[])).svg
    assert ">2</text>" in whole
    assert ">2</text>" not in short


def test_same_run_gives_same_bytes(rendered):
    """A picture depends on the run alone."""
    assert run_pictures.draw_speed(make_run()) == run_pictures.draw_speed(make_run())


def test_load_is_that_of_all_sources_together():
    """Layer 1 has 600 of 1600 assignments at two experts: 1.5 times the even share."""
    rows = expert_pictures.draw_load(make_run()).table.rows
    np.testing.assert_allclose(rows, [[0, 1, 1, 1, 1], [1, 1.5, 1.5, 0.5, 0.5]])


def test_saturation_ends_at_one():
    """The last evaluation has all of its own routing."""
    rows = router_pictures.draw_saturation(make_run()).table.rows
    assert rows[-1][2:] == (1, 1)
    assert 0 < rows[0][2] < 1


def test_source_shares_sum_to_all():
    """Each source's assignments are shared out among the experts of a layer."""
    table = expert_pictures.draw_domains(make_run()).table
    shares = np.array(table.rows).reshape(L, E, 4)
    assert list(table.columns) == ["layer", "expert", "prose (%)", "code (%)"]
    np.testing.assert_allclose(shares[..., 2:].sum(axis=1), 100)
    assert shares[1, 0, 2] == 62.5


def test_domains_differ_only_where_sources_do():
    """Both sources use layer 0 alike."""
    from moe_gpt.report.run_summary import domain_table

    first, second = domain_table(make_run()).rows
    assert first[1:] == (0, 0)
    assert 0 < second[2] < 100


def test_many_layers_are_thinned_and_said_so():
    """Of 20 layers eight are drawn, and the caption names them."""
    run = make_run()
    for record in run.records:
        record["routing"] = {key: values[:1] * 20 for key, values in record["routing"].items()}
    picture = router_pictures.draw_entropies(run)
    assert "Layers shown: 0, 3, 5, 8, 11, 14, 16, 19 of 0 to 19." in picture.caption
    assert len(picture.table.columns) == 2 + 8


def test_non_finite_steps_leave_gaps():
    """A recorded step that was not finite does not stop a picture."""
    run = make_run()
    run.records[2]["routing"]["token_entropy"] = [None, math.nan]
    assert "0.5 to 0.5" in router_pictures.draw_entropies(run).alt


@pytest.mark.parametrize(
    "draw",
    [
        run_pictures.draw_losses,
        run_pictures.draw_schedule,
        run_pictures.draw_positions,
        run_pictures.draw_norms,
        run_pictures.draw_speed,
        expert_pictures.draw_load,
        expert_pictures.draw_load_over_training,
        router_pictures.draw_violation,
        router_pictures.draw_entropies,
        router_pictures.draw_router,
        router_pictures.draw_gradients,
        router_pictures.draw_saturation,
        expert_pictures.draw_co_activation,
        expert_pictures.draw_domains,
    ],
)
def test_nothing_recorded_is_said(draw):
    """A picture of nothing is refused, with what is missing."""
    with pytest.raises(NotRecorded):
        draw(make_run(steps=[], records=[], evaluations=[], arrays=[]))


def test_dropped_assignments_are_drawn_where_there_are_any():
    """No picture of nothing; and one that lacks what it needs says so."""
    assert router_pictures.draw_dropped(make_run()) == []
    steps = [make_step(1, dropped_fraction=0.1)]
    (picture,) = router_pictures.draw_dropped(make_run(steps=steps))
    assert picture.name == "dropped"
    with pytest.raises(NotRecorded, match="not recorded"):
        router_pictures.draw_dropped(make_run(steps=steps, records=[]))


def test_tokens_show_their_white_space():
    """Spaces and line ends are visible; running text keeps its spaces and breaks its lines."""
    tokenizer = make_run().tokenizer
    assert [show_token(tokenizer, token) for token in (0, 1, 5)] == ["↵", "␣", "t5"]
    assert [show_token(tokenizer, token, keep_spaces=True) for token in (0, 1)] == ["↵\n", " "]
    assert show_token(None, 7) == "#7 "
    assert show_controls("a\x00\tb\n\x7f") == "a␀⇥b\n␡"
    assert show_controls("a\u202eb") == "aU+202Eb"


def test_routed_samples_follow_the_choices():
    """Each token of running text has its experts, best first."""
    run = make_run()
    layer, samples = routed_samples(run, n_tokens=5)[1]
    assert (layer, list(samples)) == (1, ["prose", "code"])
    assert [experts for _, experts in samples["prose"]] == run.arrays[-1].slices["prose"].choices[1, 0, :5].tolist()
    assert samples["prose"][4][0] == "t4"


def test_favourite_tokens_are_those_beyond_chance():
    """An expert that gets every occurrence of one token has it first, with 100 %."""
    run, arrays = make_run(), make_arrays(30, 2.0)
    for part in arrays.slices.values():
        part.choices[:] = [1, 2]
        part.choices[:, part.tokens == 5] = [0, 3]
    layer, favourites = favourite_tokens(dataclasses.replace(run, arrays=[arrays]))[0]
    assert layer == 0
    assert favourites[0][0] == ("t5", 100)


@pytest.mark.usefixtures("rendered")
def test_grid_of_a_png_is_light():
    """On a page the grid has the page's colour; a PNG on white has a light one, not what stands for it in the SVG."""
    with pictures.drawing() as (figure, axes):
        axes.grid(True)
        svg, png = pictures.render(figure, "example")
    pixels = (image.imread(io.BytesIO(png))[..., :3] * 255).round()
    height, width = pixels.shape[:2]
    inside = pixels[height // 3, width // 4 : -width // 4]
    assert inside.min() == 0xDD
    assert "var(--grid)" in svg
