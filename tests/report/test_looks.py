"""What a report shows of a model that sees: scores beside those without seeing, and where words look."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from made_up_run import make_run
from safetensors.numpy import save_file

from moe_gpt.report import looks, tuning
from moe_gpt.report.missing import NotRecorded
from moe_gpt.report.recorded import RunRecords

SCORE = {"score": 0.9, "n": 200, "standard_error": 0.02, "shuffled": 0.25, "blind": 0.3, "random_object": None}
SCORES = {"stage": "see", "before": {}, "after": {"count": SCORE}, "forgetting": {"before": {}, "after": {}}}
SCORES |= {
    f"answers_{time}": [{"prompt": "<image>How many", "expected": " two", "answer": " two"}]
    for time in ("before", "after")
}


@pytest.fixture
def run(tmp_path) -> RunRecords:
    """A run with two answers, the second word of which looks at the lower right corner."""
    weights = np.zeros((2, 4, 4), np.float32)
    weights[0, 1, 2] = weights[1, 3, 3] = 0.5
    arrays = {
        f"{k}/{name}": part
        for k in (0, 1)
        for name, part in (("picture", np.full((3, 8, 8), 99, np.uint8)), ("weights", weights))
    }
    save_file(
        arrays, tmp_path / "looks.safetensors", {"0": json.dumps([" two", " dogs\n"]), "1": json.dumps([" one", "."])}
    )
    made = make_run(config=make_run().config | {"see": {"size": 8}}, stage_scores=SCORES)
    return dataclasses.replace(made, run_dir=tmp_path)


@pytest.mark.slow
def test_words_are_drawn_over_what_they_look_at(run, page_of, rendered):
    """The table has the place; the page has the picture, and the scores with their baselines."""
    picture = looks.draw_looks(run)
    assert picture.table.rows[:2] == [(1, "two", 2, 3, 100.0), (1, "dogs", 4, 4, 100.0)]
    assert "1: two dogs; 2: one." in picture.alt
    page = page_of(run)
    assert '<figure id="looks">' in page
    (table,) = tuning.scores(run)
    assert table.columns == ("task", "n", "score", "shuffled", "blind", "random_object")
    assert table.rows == [("count", 200, "0.900 ± 0.020", "0.250", "0.300", "–")]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no file", "cut", "other names"])
def test_a_page_without_that_file_lacks_the_picture(run, page_of, damage):
    """Also where it is damaged."""
    path = run.run_dir / "looks.safetensors"
    if damage == "no file":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    else:
        save_file({"a": np.zeros(3)}, path, {"0": "[]"})
    with pytest.raises(NotRecorded):
        looks.draw_looks(run)
    assert '<figure id="looks">' not in page_of(run)
