"""Sending a run's metrics to TensorBoard or Weights & Biases, through one small interface.

Off by default. Both packages are imported only where they are asked for, and one that is missing is the only error that
is raised: whatever else a service raises is told once, and the run goes on without it. ``metrics.jsonl`` has everything
in any case.
"""

from __future__ import annotations

import hashlib
import html
import importlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from moe_gpt.errors import InputError
from moe_gpt.measure.metric_names import VALIDATION

TrackerName = Literal["none", "tensorboard", "wandb"]


class Tracker(Protocol):
    """A place where the curves of a run are drawn."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point at x = step to the curve of each name."""

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text, such as a generated sample; it is shown as it is, line by line."""

    def close(self) -> None:
        """Send what is not yet sent, and end. Whatever is logged afterwards goes nowhere."""


def open_tracker(
    name: TrackerName,
    run_dir: Path,
    settings: dict[str, Any],
    say: Callable[[str], None],
    resumed_at: int | None = None,
) -> Tracker:
    """Open the tracker of a run; "none" does nothing.

    TensorBoard's files are in ``run_dir / "tensorboard"``. For Weights & Biases the run directory's full path is the
    identity of the run: the same directory always continues the same curves.

    Args:
        name: the value of the setting ``tracking``.
        run_dir: the run's directory.
        settings: the resolved config; it is sent once, here.
        say: is told, in one line and at most once, that the service failed. The tracker is silent from then on.
        resumed_at: the last step of an earlier part of the run that is kept. TensorBoard hides what it has of later
            steps; Weights & Biases cannot remove points, so steps that are done again have two. A run that goes back
            while it runs closes its tracker and opens another.

    Raises:
        InputError: where the service's package is not installed.
    """
    openers: dict[TrackerName, Callable[[], Tracker]] = {
        "none": _Nowhere,
        "tensorboard": lambda: _TensorBoard(run_dir, settings, resumed_at),
        "wandb": lambda: _WeightsAndBiases(run_dir, settings),
    }
    return _Guarded(name, openers[name], say)


def require_tracker(name: TrackerName) -> None:
    """See that the tracker's package is there, before anything is written.

    Raises:
        InputError: where it is not.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise _missing(name)


def _missing(package: str) -> InputError:
    requirement = {"tensorboard": "'moe_gpt[track]'"}.get(package, package)
    return InputError(
        f"tracking={package} needs the package {package}, which is not installed; run pip install {requirement}, or "
        "set tracking=none"
    )


class _Nowhere:
    """Does nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def text(self, step: int, name: str, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Guarded:
    """Passes everything on until the service fails, which is told once, or is closed."""

    def __init__(self, name: TrackerName, open_service: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._service: Tracker = _Nowhere()
        with self._failure_told():
            self._service = open_service()

    @contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # a service may raise anything, and no curve is worth a run
            self._service = _Nowhere()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            self._say(f"tracking by {self._name} stopped: {reason}; metrics.jsonl has everything")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            with self._failure_told():
                self._service.log(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        with self._failure_told():
            self._service.text(step, name, text)

    def close(self) -> None:
        with self._failure_told():
            self._service.close()
        self._service = _Nowhere()  # a closed SummaryWriter would begin another file


class _TensorBoard:
    """Writes event files below the run's directory."""

    def __init__(self, run_dir: Path, settings: dict[str, Any], resumed_at: int | None) -> None:
        _import("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # events of purge_step itself are hidden too, and resumed_at is a step that is not done again
        first_step = 0 if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step, flush_secs=10)
        self.text(first_step, "settings", json.dumps(settings, indent=2, default=str))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        # the text is read as Markdown, where what is indented by four spaces stays as it is
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Sends to the service that ``wandb login`` or the environment names."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]) -> None:
        self._wandb = _import("wandb")
        folder = run_dir.resolve()
        self._run = self._wandb.init(
            project="moe_gpt",
            name=folder.name,
            dir=str(folder),
            id=hashlib.sha256(os.fsencode(folder)).hexdigest()[:16],
            resume="allow",
            config=settings,
        )
        # wandb's own step can only grow: it would drop what is logged out of order, and all steps that are done again
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def text(self, step: int, name: str, text: str) -> None:
        page = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        self._run.log({name: self._wandb.Html(page), "step": step})

    def close(self) -> None:
        self._run.finish()


def _import(package: TrackerName) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # installed, but something that it needs is not
            raise
        raise _missing(package) from None


def tracked_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of ``metrics.jsonl`` under the names that trackers show.

    An optimizer step's numbers are ``train/<key>``, an evaluation's keep their names ``val/...``, and a recording's are
    ``routing/layer_03/...``, ``routing/layer_03/load/expert_07`` and ``norms/<group>/...``. ``step`` is the x axis, not
    a value. A flag is 0 or 1. What is missing, not a number or not finite is left out.
    """
    values = {key: value for key, value in line.items() if key.startswith(VALIDATION)}
    for name, layers in _mapping(line, "routing").items():
        values.update(_by_layer(name, layers))
    for group in _mapping(line, "groups"):
        values.update({f"norms/{group}/{name}": norm for name, norm in _mapping(line["groups"], group).items()})
    others = line.keys() - {"step", "routing", "groups", *values}
    if len(others) < len(line) - 1:  # no optimizer step, whose own line has the tokens
        others -= {"tokens_seen"}
    values.update({f"train/{key}": line[key] for key in others})
    return {name: float(value) for name, value in values.items() if _is_finite_number(value)}


def _mapping(line: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = line.get(key)
    return value if isinstance(value, Mapping) else {}


def _by_layer(name: str, layers: Any) -> Iterator[tuple[str, Any]]:
    """Name one quantity of the routing: a number per layer, or per layer and expert."""
    for layer, value in _numbered("layer", layers):
        if isinstance(value, list | tuple):
            yield from ((f"routing/{layer}/{name}/{expert}", number) for expert, number in _numbered("expert", value))
        else:
            yield f"routing/{layer}/{name}", value


def _numbered(noun: str, items: Any) -> Iterator[tuple[str, Any]]:
    """Name the items so that sorting by name keeps their order: two digits, or more where there are 100 or more."""
    items = items if isinstance(items, list | tuple) else []
    n_digits = max(2, len(str(len(items))))
    for i, item in enumerate(items):
        yield f"{noun}_{i:0{n_digits}d}", item


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
