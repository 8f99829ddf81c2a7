"""The plan in at most twelve lines: time, money, memory, what was assumed, and what moe_gpt itself needs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import jinja2

from moe_gpt.config import RunConfig
from moe_gpt.plan.data_files import read_data
from moe_gpt.plan.options import PlanOptions
from moe_gpt.plan.quantities import PlanSection
from moe_gpt.plan.training_cost import idles, training_work
from moe_gpt.terminal.numbers import format_count, format_value, plural

TEMPLATES = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)  # noqa: S701 (text)
"""Reads the texts that name a plan's numbers; ``{{ compute.cost|shown("dollars") }}`` is "$1.20"."""
TEMPLATES.filters.update(shown=format_value, short=format_count, spec=format, plural=plural)
_WIDTH = 80
_HEADING = 10


def answer(config: RunConfig, options: PlanOptions, sections: Iterable[PlanSection]) -> str:
    """Return the plan of ``plan_run`` as at most twelve lines of 80 columns; the texts are in answer.yaml.

    Args:
        config: that was planned.
        options: with which.
        sections: what ``plan_run`` returned for them.
    """
    by_name = {section.name: section for section in sections}
    notes, gpu = by_name["memory"].notes, options.gpu
    advice = [index for index, note in enumerate(notes) if note.startswith(("Change first", "That is not enough"))]
    words = {
        **dict.fromkeys(("mfu_from_duration", "tokens_from_budget")),
        **{name: section.values for name, section in by_name.items()},
        "most": "at most " if training_work(config, options.tokens).is_at_most else "",
        "options": options,
        "d_model": config.model.d_model,
        "is_cpu": options.is_one_cpu,
        "place": plural(gpu.cores, "core") if options.is_one_cpu else f"{options.layout.n_gpus:,} {gpu.name}",
        "idles": idles(config, options),
        "advice": notes[advice[0] :] if advice else [],
    }
    lines: list[str] = []
    for heading, template in read_data("answer.yaml").items():
        text = " ".join(TEMPLATES.from_string(template).render(words).split())
        first, after = f"{heading:<{_HEADING}}", " " * _HEADING
        lines += textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=after)
    return "\n".join(lines)
