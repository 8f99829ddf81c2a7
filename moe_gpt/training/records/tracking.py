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
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_gpt.errors import InputError
from moe_gpt.measure.metric_names import VALIDATION

TrackerName = Literal["none", "tensorboard", "wandb"]


class _Service(NamedTuple):
    """What a tracker's package can do."""

    log: Callable[[Mapping[str, float], int], Any]
    text: Callable[[str, str, int], Any]
    close: Callable[[], Any]


class Tracker:
    """A place where the curves of a run are drawn, until it fails or is closed.

    Args:
        name: of the service, for the message.
        service: nothing where the run is not tracked.
        say: told, in one line and at most once, that the service failed.
    """

    def __init__(self, name: str, service: Callable[[], _Service | None], say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._service: _Service | None = None
        self._service = self._guarded(service)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point at x = step to the curve of each name."""
        if self._service and values:
            self._guarded(self._service.log, values, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text, such as a generated sample; it is shown as it is, line by line."""
        if self._service:
            self._guarded(self._service.text, name, text, step)

    def close(self) -> None:
        """Send what is not yet sent, and end. Whatever is logged afterwards goes nowhere."""
        if self._service:
            self._guarded(self._service.close)
        self._service = None  # a closed SummaryWriter would begin another file

    def _guarded(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except InputError:
            raise
        except Exception as error:  # a service may raise anything, and no curve is worth a run
            self._service = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            self._say(f"tracking by {self._name} stopped: {reason}; metrics.jsonl has everything")


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
        say: told, in one line and at most once, that the service failed.
        resumed_at: the last step of an earlier part of the run that is kept. TensorBoard hides what it has of later
            steps; Weights & Biases cannot remove points, so steps that are done again have two. A run that goes back
            while it runs closes its tracker and opens another.

    Raises:
        InputError: where the service's package is not installed.
    """
    openers: dict[TrackerName, Callable[[], _Service | None]] = {
        "none": lambda: None,
        "tensorboard": lambda: _tensorboard(run_dir, settings, resumed_at),
        "wandb": lambda: _weights_and_biases(run_dir, settings),
    }
    return Tracker(name, openers[name], say)


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


def _import(package: TrackerName) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # installed, but something that it needs is not
            raise
        raise _missing(package) from None


def _tensorboard(run_dir: Path, settings: dict[str, Any], resumed_at: int | None) -> _Service:
    """Write event files below the run's directory."""
    _import("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    # events of purge_step itself are hidden too, and resumed_at is a step that is not done again
    first_step = 0 if resumed_at is None else resumed_at + 1
    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step, flush_secs=10)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def text(name: str, text: str, step: int) -> None:
        # the text is read as Markdown, where what is indented by four spaces stays as it is
        writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    text("settings", json.dumps(settings, indent=2, default=str), first_step)
    return _Service(log, text, writer.close)


def _weights_and_biases(run_dir: Path, settings: dict[str, Any]) -> _Service:
    """Send to the service that ``wandb login`` or the environment names."""
    wandb = _import("wandb")
    folder = run_dir.resolve()
    identity = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    run = wandb.init(project="moe_gpt", name=folder.name, dir=str(folder), id=identity, resume="allow", config=settings)
    # wandb's own step can only grow: it would drop what is logged out of order, and all steps that are done again
    run.define_metric("*", step_metric="step")

    def text(name: str, text: str, step: int) -> None:
        page = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        run.log({name: wandb.Html(page), "step": step})

    return _Service(lambda values, step: run.log({**values, "step": step}), text, run.finish)


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
