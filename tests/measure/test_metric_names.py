"""Names of scores in metrics.jsonl."""

from __future__ import annotations

import pytest

from moe_gpt.measure.metric_names import MetricName, scored_sources


def test_a_name_is_read_as_it_is_written():
    """Parsing a name gives back what was written."""
    name = MetricName("prose", "ce_loss")
    assert str(name) == "val/prose/ce_loss"
    assert MetricName.parse(str(name)) == name


@pytest.mark.parametrize("text", ["step", "val/max_violation", "train/prose/ce_loss", "val/a/b/c", ""])
def test_other_keys_are_no_scores_of_a_source(text):
    """Keys of steps, of all sources together and of other depth have no source."""
    assert MetricName.parse(text) is None


def test_sources_have_the_order_of_their_first_score():
    """A source that is scored again is not listed again."""
    lines = [{"step": 1, "val/b/ce_loss": 1.0, "val/max_violation": 2.0}, {"val/a/ce_loss": 1.0, "val/b/ce_loss": 1.0}]
    assert scored_sources(lines) == ["b", "a"]
