"""Sending a run's metrics to TensorBoard or Weights & Biases, through one small interface.

Tracking is off by default, and both packages are imported only if they are used. A missing package is an error. After
any other failure of a service, the run says so once and goes on without it; ``metrics.jsonl`` still has everything.
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
    """The functions of a tracker's package."""

    log: Callable[[Mapping[str, float], int], Any]
    text: Callable[[str, str, int], Any]
    close: Callable[[], Any]


class Tracker:
    """A service that draws the curves of a run, until it fails or is closed.

    Args:
        name: of the service, for the message.
        service: opens the service; returns None if the run is not tracked.
        say: shows one line, at most once, if the service fails.
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
        """Add a text, such as a generated sample; it is shown without formatting."""
        if self._service:
            self._guarded(self._service.text, name, text, step)

    def close(self) -> None:
        """Send what is still waiting, and close. Later calls do nothing."""
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
            self._say(f"tracking by {self._name} stopped: {reason}; metrics.jsonl has all metrics")


def open_tracker(
    name: TrackerName,
    run_dir: Path,
    settings: dict[str, Any],
    say: Callable[[str], None],
    resumed_at: int | None = None,
) -> Tracker:
    """Open the tracker of a run; "none" does nothing.

    TensorBoard's files are in ``run_dir / "tensorboard"``. Weights & Biases identifies the run by the full path of its
    folder, so the same folder always continues the same curves.

    Args:
        name: the value of the setting ``tracking``.
        settings: the resolved config; it is sent once, here.
        say: shows one line, at most once, if the service fails.
        resumed_at: the last step that is kept of an earlier part of the run. TensorBoard hides its points of later
            steps. Weights & Biases cannot remove points, so a step that is done again has two. A run that goes back
            closes its tracker and opens another.
    """
    openers: dict[TrackerName, Callable[[], _Service | None]] = {
        "none": lambda: None,
        "tensorboard": lambda: _tensorboard(run_dir, settings, resumed_at),
        "wandb": lambda: _weights_and_biases(run_dir, settings),
    }
    return Tracker(name, openers[name], say)


def require_tracker(name: TrackerName) -> None:
    """Raise ``InputError``, before anything is written, if the tracker's package is not installed."""
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
        if error.name != package:  # the package is there, but one of its own imports is missing
            raise
        raise _missing(package) from None


def _tensorboard(run_dir: Path, settings: dict[str, Any], resumed_at: int | None) -> _Service:
    """Write event files below the run's directory."""
    _import("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides purge_step itself, too; resumed_at must stay visible
    first_step = 0 if resumed_at is None else resumed_at + 1
    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step, flush_secs=10)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def text(name: str, text: str, step: int) -> None:
        # TensorBoard reads Markdown, in which lines indented by four spaces stay as they are
        writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    text("settings", json.dumps(settings, indent=2, default=str), first_step)
    return _Service(log, text, writer.close)


def _weights_and_biases(run_dir: Path, settings: dict[str, Any]) -> _Service:
    """Send to the service that ``wandb login`` or the environment names."""
    wandb = _import("wandb")
    folder = run_dir.resolve()
    identity = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    run = wandb.init(project="moe_gpt", name=folder.name, dir=str(folder), id=identity, resume="allow", config=settings)
    # wandb's own step can only grow, so it would drop points logged out of order and steps that are done again
    run.define_metric("*", step_metric="step")

    def text(name: str, text: str, step: int) -> None:
        page = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        run.log({name: wandb.Html(page), "step": step})

    return _Service(lambda values, step: run.log({**values, "step": step}), text, run.finish)


def tracked_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of ``metrics.jsonl`` under the names that trackers show.

    The numbers of an optimizer step are ``train/<key>``. Those of an evaluation keep their names ``val/...``. Those of
    a recording are ``routing/layer_03/...``, ``routing/layer_03/load/expert_07`` and ``norms/<group>/...``. ``step`` is
    the x axis, not a value. A flag is 0 or 1. Missing and non-finite values are left out.
    """
    values = {key: value for key, value in line.items() if key.startswith(VALIDATION)}
    values.update(_recorded_values(line))
    others = line.keys() - {"step", "routing", "groups", *values}
    if len(others) < len(line) - 1:  # an evaluation or a recording; the step's own line has the tokens
        others -= {"tokens_seen"}
    values.update({f"train/{key}": line[key] for key in others})
    return {name: float(value) for name, value in values.items() if _is_finite_number(value)}


def _recorded_values(line: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the routing and the norms of a recorded step."""
    for name, layers in _mapping(line, "routing").items():
        yield from _by_layer(name, layers)
    groups = _mapping(line, "groups")
    for group in groups:
        yield from ((f"norms/{group}/{name}", norm) for name, norm in _mapping(groups, group).items())


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
    """Number the items with two or more digits, so that sorting by name keeps their order."""
    items = items if isinstance(items, list | tuple) else []
    n_digits = max(2, len(str(len(items))))
    for i, item in enumerate(items):
        yield f"{noun}_{i:0{n_digits}d}", item


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
