"""Pictures for reports: matplotlib figures that read well in light and dark, on paper, and without seeing them.

A picture is an SVG whose ink takes the page's colour, the same as PNG on white, a sentence that says what is in it, and
the numbers it was drawn from. Its words are in picture_words.yaml, its colours in style.yaml.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from moe_gpt.report.series import Series, spread
from moe_gpt.report.words import say, words
from moe_gpt.terminal.numbers import format_count, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("style.yaml").read_text(encoding="utf-8"))
COLOURS: list[str] = _STYLE["colours"]
"""For lines, in this order; beyond them line styles change."""
INK: str = _STYLE["ink"]
"""What text and axes are drawn with."""
_GRID = "#dddddd"  # on white; a page has its own
_TEXT_BREAKS_AFTER = 10
"""Characters of the narrowest column of texts, which break anywhere."""
MOST_LAYERS = 8
"""Layers drawn as lines or panels; of more, so many are shown, evenly spread."""
WIDTH = 5.6
"""Inches of a picture: on a page its text grows by a fifth, on a phone it keeps nine tenths of its size and scrolls."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers for people: the headings name units."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    has_texts: bool = False
    """Whether cells are texts of prompts and answers, whose line ends are shown."""

    @classmethod
    def of(cls, columns: Mapping[str, Iterable[Any]], title: str = "", has_texts: bool = False) -> Table:
        """Return the table of equally long columns by their headings."""
        return cls(tuple(columns), list(zip(*columns.values(), strict=True)), title, has_texts)

    @property
    def n_characters(self) -> int:
        """About how many characters it is wide at least: a line cannot break within a word or a number."""
        words = [[len(word) for cell in column for word in format_number(cell).split()] for column in self._whole()]
        longest = _TEXT_BREAKS_AFTER if self.has_texts else sys.maxsize
        return sum(min(max(lengths, default=0), longest) + 2 for lengths in words)

    def _whole(self) -> list[tuple[Any, ...]]:
        """Return the columns with their headings."""
        return list(zip(self.columns, *self.rows, strict=True))

    def turned(self) -> Table:
        """Return the table with its rows as columns: few runs with many numbers fit a narrow page that way."""
        headings, *rows = self._whole()
        return Table(headings, rows, self.title)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with everything that a page needs of it."""

    name: str
    """For files and anchors: lower case, words joined by hyphens."""
    title: str
    alt: str
    """What somebody who does not see it should know: what is drawn, and what it shows in numbers."""
    caption: str
    """What the quantities are and how to read them."""
    svg: str
    png: bytes
    table: Table


def line_look(index: int) -> dict[str, Any]:
    """Return colour and style of the line with this index: different for the first 32."""
    again, place = divmod(index, len(COLOURS))
    return {"color": COLOURS[place], "linestyle": _STYLE["line_styles"][again % len(_STYLE["line_styles"])]}


@contextlib.contextmanager
def drawing(
    n_rows: int = 1, n_columns: int = 1, width: float = WIDTH, height: float = 3.2, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """Open a figure in our style, with its axes as matplotlib's ``subplots`` gives them; sizes in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE["matplotlib"]):
        figure, axes = pyplot.subplots(n_rows, n_columns, figsize=(width, height), layout="constrained", **options)
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


@contextlib.contextmanager
def panels(
    titles: Sequence[str],
    units: Sequence[str],
    n_columns: int,
    heights: tuple[float, float],
    label_x: Callable[[Axes], Any],
    **options: Any,
) -> Iterator[tuple[Figure, Any]]:
    """Open a figure with a panel for each title, as an array of axes.

    Args:
        titles: of the panels.
        units: of the vertical axes, written where a panel is the first of its row or has another unit than that one.
        n_columns: panels side by side.
        heights: the inches that are there besides the rows, and those of a row.
        label_x: labels a horizontal axis; called for the lowest panels.
        options: of ``drawing``.
    """
    n_rows = -(-len(titles) // n_columns)
    total = heights[0] + heights[1] * n_rows
    with drawing(n_rows, n_columns, height=total, squeeze=False, **options) as (figure, grid):
        for axes in grid.flat[len(titles) :]:
            axes.set_visible(False)
        shown = grid.flat[: len(titles)]
        for index, (axes, title, unit) in enumerate(zip(shown, titles, units, strict=True)):
            axes.set_title(title)
            if index % n_columns == 0 or unit != units[index - index % n_columns]:
                axes.set_ylabel(unit)
        for axes in shown[-n_columns:]:
            axes.tick_params(labelbottom=True)
            label_x(axes)
        yield figure, shown


@contextlib.contextmanager
def by_layer(
    n_layers: int, most: int, n_columns: int, heights: tuple[float, float], unit: str, label_x: Callable[[Axes], Any]
) -> Iterator[tuple[Figure, dict[int, Axes], dict[str, Any]]]:
    """Open a figure with a panel for each layer, at most so many, evenly spread; with what its words say of layers."""
    shown = spread(n_layers, most)
    units, options = [unit] * len(shown), {"sharex": True, "sharey": True}
    with panels(titles_of(shown), units, n_columns, heights, label_x, **options) as (figure, grid):
        yield figure, dict(zip(shown, grid, strict=True)), {"shown": shown, "n_layers": n_layers}


def titles_of(layers: Sequence[int]) -> list[str]:
    """Return what the panels or columns of layers are called."""
    return [f"layer {layer}" for layer in layers]


def draw_lines(axes: Axes, lines: Mapping[str, Series], limit: int = 300) -> None:
    """Draw lines over tokens seen by their labels, each with a look of its own, as means of at most ``limit`` parts."""
    for index, (label, series) in enumerate(lines.items()):
        axes.plot(*series.shortened(limit), label=label, **line_look(index) | marks(len(series.tokens)))


def marks(n_points: int) -> dict[str, Any]:
    """Return how a line's points are marked: few as dots; two have no line, which would suggest what is between."""
    dots: dict[str, Any] = {"marker": "o", "markersize": 3} if n_points <= 20 else {}
    return dots | ({"linestyle": "none"} if n_points <= 2 else {})


class Panel(NamedTuple):
    """Lines over tokens seen, by their labels."""

    title: str
    unit: str
    lines: dict[str, Series]

    @property
    def name(self) -> str:
        """The title, or the unit of a panel that stands alone."""
        return self.title or self.unit


def draw_panels(
    name: str,
    drawn: Sequence[Panel],
    n_columns: int,
    heights: tuple[float, float],
    adjust: Callable[[Axes], Any] = lambda axes: None,
    table: Table | None = None,
    over: str = "tokens seen",
    **facts: Any,
) -> Picture:
    """Draw panels of lines, which share a legend.

    Args:
        name: of the picture, in picture_words.yaml.
        drawn: the panels; their lines have the same labels.
        n_columns: panels side by side.
        heights: inches besides the rows, and of a row.
        adjust: what else is done to each panel.
        table: the numbers; by default some of each panel.
        over: what the horizontal axis has.
        facts: what the picture's words are about, besides ``panels``.
    """
    titles, units = zip(*((panel.title, panel.unit) for panel in drawn), strict=True)
    label_x = functools.partial(count_axis, label=over)
    with panels(titles, units, n_columns, heights, label_x, sharex=True) as (figure, grid):
        for axes, panel in zip(grid, drawn, strict=True):
            draw_lines(axes, panel.lines)
            adjust(axes)
        legend_below(figure, labelled(grid[0]))
        return finish(figure, name, table or _table_of_panels(drawn, over), panels=drawn, **facts)


def _table_of_panels(drawn: Sequence[Panel], over: str) -> Table:
    rows = []
    for panel in drawn:
        found = [dict(zip(*line, strict=True)) for line in panel.lines.values()]
        tokens = sorted(set().union(*found))
        rows += [(panel.name, tokens[at], *(line.get(tokens[at]) for line in found)) for at in spread(len(tokens), 12)]
    return Table(("quantity", over, *drawn[0].lines), rows)


def legend_below(figure: Figure, lines: Mapping[str, Any]) -> None:
    """Name lines by their labels below all axes, which keep their height; long labels are broken."""
    if not lines:
        return
    n_characters = int(13 * figure.get_figwidth())  # of its size, side by side
    labels = [textwrap.fill(label, n_characters - 8) for label in lines]
    n_columns = max(1, min(len(labels), n_characters // (max(map(len, labels)) + 6)))
    n_lines = sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-n_lines // n_columns))
    figure.legend(list(lines.values()), labels, loc="outside lower center", ncols=n_columns)


def labelled(axes: Axes) -> dict[str, Any]:
    """Return the lines of some axes by their labels."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def finish(figure: Figure, name: str, table: Table, **facts: Any) -> Picture:
    """Return the picture of a figure that is drawn; call it inside ``drawing``.

    Args:
        figure: with everything in it.
        name: of the picture, in picture_words.yaml.
        table: the numbers that it was drawn from.
        facts: what its words are about.
    """
    told = words()["pictures"][name]
    alt, caption = (say(told[kind], **facts) for kind in ("alt", "caption"))
    return Picture(name, told["title"], alt, caption, *render(figure, name), table)


def render(figure: Figure, name: str) -> tuple[str, bytes]:
    """Return a figure as SVG for inside a page, and as PNG. The same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    svg, png = io.StringIO(), io.BytesIO()
    figure.set_dpi(150)
    # savefig would draw each twice, and lay both out
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")
    figure.set(dpi=150, facecolor="white")
    for line in (line for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for line in axis.get_gridlines()):
        line.set_color(_GRID)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return _inline(svg.getvalue(), name), png.getvalue()


def _inline(svg: str, name: str) -> str:
    """Return the SVG for use inside a page: the page's ink, no prolog, ids of its own, its width as a variable."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r'<svg \1style="--width: \2pt"', svg, count=1)
    return svg.replace(INK, "var(--ink)").replace(_STYLE["grid"], "var(--grid)")


def standalone(picture: Picture) -> str:
    """Return the SVG as a file of its own: real colours on white, and the alternative text as its description."""
    svg = picture.svg.replace("var(--ink)", "#111111").replace("var(--grid)", _GRID)
    words = f"<title>{html.escape(picture.title)}</title><desc>{html.escape(picture.alt)}</desc>"
    head, body = svg.split(">", 1)
    head = re.sub(r'style="--width: ([\d.]+)pt"', r'width="\1pt" style="background: white"', head)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head} role="img">{words}{body}'


def count_axis(axes: Axes, label: str = "tokens seen") -> None:
    """Label the horizontal axis, and write its numbers as ``format_count`` does."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(count_tick)


def count_tick(value: float, place: float) -> str:
    """Return what a tick of an axis of counts says; matplotlib gives its place, too."""
    return format_count(value)


def log_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers: 0.001, 0.2, 30; further marks where it spans little."""
    low, high = axes.dataLim.intervaly
    if 0 < low == high:
        axes.set_ylim(low / 2, 2 * high)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    leading = "23468" if high < 10 * low else "235" if high < 100 * low else ""
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in leading else "")
