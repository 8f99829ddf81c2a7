"""What a report shows of a model that sees: pictures, its answers, and where in the picture each word looks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_gpt.report.missing import need
from moe_gpt.report.pictures import Picture, Table, drawing, finish
from moe_gpt.report.recorded import RunRecords

_MOST_WORDS = 6


def draw_looks(run: RunRecords) -> Picture:
    """Draw pictures with the words of the answers, each word over what it looks at."""
    found = _read(run)
    need(found, "where answers look is not recorded (looks.safetensors)")
    n_columns = 1 + min(_MOST_WORDS, max(len(words) for words, *_ in found))
    rows = list[tuple[Any, ...]]()
    with drawing(len(found), n_columns, height=1.15 * len(found), squeeze=False) as (figure, grid):
        for axes in grid.flat:
            axes.set_axis_off()
        for number, ((words, picture, weights), line) in enumerate(zip(found, grid, strict=True), 1):
            height, width = picture.shape[:2]
            line[0].imshow(picture)
            line[0].set_title(f"picture {number}")
            for word, part, axes in zip(words, weights, line[1:], strict=False):
                axes.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
                axes.imshow(part, cmap="inferno", alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
                axes.set_title(" ".join(word.split()) or "(blank)")
                rows.append((number, word.strip(), *_peak(part)))
        table = Table(("picture", "word", "line it looks at most", "column", "share there (%)"), rows)
        return finish(figure, "looks", table, answers=["".join(words).strip() for words, *_ in found], peaks=rows)


def _peak(weights: np.ndarray) -> tuple[int, int, float]:
    """Return the line and column of the part that is looked at most, from 1, and its share in percent."""
    line, column = np.unravel_index(weights.argmax(), weights.shape)
    return int(line) + 1, int(column) + 1, float(100 * weights.max() / max(weights.sum(), 1e-9))


def _read(run: RunRecords) -> list[tuple[list[str], np.ndarray, np.ndarray]]:
    """Return the words, the picture (H, W, 3) and the weights (words, rows, columns) of each answer."""
    path = run.run_dir / "looks.safetensors"
    if not path.is_file():
        return []
    try:
        with safe_open(path, "np") as file:
            words = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        return [
            (said, arrays[f"{name}/picture"].transpose(1, 2, 0), arrays[f"{name}/weights"])
            for name, said in sorted(words.items())
        ]
    except (SafetensorError, OSError, KeyError, ValueError):
        return []
