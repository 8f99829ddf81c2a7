"""The notebook runs from top to bottom, and is stored with outputs that are not too large."""

from __future__ import annotations

from pathlib import Path

import pytest

TOUR = Path(__file__).resolve().parents[1] / "notebooks" / "tour.ipynb"


def test_notebook_is_stored_with_its_outputs():
    """Every code cell that shows something has its output, pictures among them, in less than 500 kB."""
    import nbformat

    notebook = nbformat.read(TOUR, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 3
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert TOUR.stat().st_size < 500_000


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    """No cell raises."""
    import nbclient
    import nbformat

    notebook = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
