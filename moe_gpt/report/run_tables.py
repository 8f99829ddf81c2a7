"""Tables and lists about one run: scores, generated text, events, settings."""

from __future__ import annotations

import collections
from typing import Any

import yaml

from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Table
from moe_gpt.report.recorded import RunRecords, section_of
from moe_gpt.report.run_summary import domain_table, perplexity


def validation_table(run: RunRecords) -> Table:
    """Return each source's scores at the first and the last evaluation."""
    rows = []
    for source, losses in run.all_scores().items():
        bits = dict(zip(*run.scores(source, "bits_per_byte"), strict=True))
        rows += [(source, *at, perplexity(at[1]), bits.get(at[0])) for at in zip(*losses.spread(2), strict=True)]
    need(rows, "there is no evaluation, so there are no scores on held-out text")
    columns = ("source", "tokens seen", "loss (nats per token)", "perplexity", "bits per byte")
    return Table(columns, rows, "Held-out text at the first and the last evaluation")


def differences_between_sources(run: RunRecords) -> Table:
    """Return the domain information of each layer, where there are sources to tell apart."""
    need(len(run.counts_by_source()[0]) > 1, "there is one source of text only, so there is no domain information")
    return domain_table(run)


def generated(run: RunRecords) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return the generated texts of each source, with the steps that they are from."""
    found = collections.defaultdict[str, list[tuple[int, str]]](list)
    for line in run.evaluations:
        for source, text in section_of(line, "samples").items():
            found[source].append((line["step"], str(text)))
    need(found, "no evaluation has recorded a generated text (train.sample_tokens)")
    return [(source, found[source]) for source in run.in_order(found)]


def events(run: RunRecords) -> list[dict[str, Any]]:
    """Return everything that happened besides steps that went well, oldest first."""
    reason = {"kind": "skipped step", "why": "loss or gradient was not finite"}
    skipped = [{"step": line["step"], **reason} for line in run.steps if line.get("skipped")]
    return sorted([*run.events, *skipped], key=lambda event: event["step"])


def settings(run: RunRecords) -> str:
    """Return the config as YAML."""
    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
