"""``moe-gpt study``: arms, seeds and comparisons over ordinary runs."""

from __future__ import annotations

import contextlib
import datetime
import json as json_format
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from moe_gpt.commands.next_command import command_line
from moe_gpt.commands.options import AboveZero, Switch, Whole
from moe_gpt.errors import InputError
from moe_gpt.terminal.numbers import plural

if TYPE_CHECKING:
    from moe_gpt.studies.plan import Planned, Study
    from moe_gpt.studies.results import Row
    from moe_gpt.studies.runner import Runner

Rerun = Annotated[tuple[Literal["stale", "failed"], ...], Parameter(negative="", show_default=False)]


def _load(config: str, out: Path | None) -> Study:
    try:
        from moe_gpt.studies.plan import load_study
    except ImportError as error:
        raise InputError(f"study needs {error.name}, which is not installed: pip install 'moe_gpt[study]'") from None
    return load_study(config, out)


def run(
    config: str,
    *,
    out: Path | None = None,
    jobs: Whole | None = None,
    minutes: AboveZero | None = None,
    rerun: Rerun = (),
) -> int:
    """Train the runs of a study that are not finished, several at once, and print its tables.

    Args:
        config: A study's YAML file, or the name of one that comes with moe_gpt, such as quick.yaml.
        out: Folder of the runs and tables; studies/ and the study's name by default.
        jobs: Runs at once; by default one for each GPU, or else one for each core.
        minutes: Start no run after this many minutes.
        rerun: Train runs again that are stale (the old ones are kept in OUT/replaced), or that failed.
    """
    study = _load(config, out)
    from moe_gpt.studies.runner import Runner
    from moe_gpt.studies.tables import write_tables

    runner = Runner(study, jobs, minutes, rerun)
    n_left, n_done = len(runner.those("waiting")), len(runner.those("finished"))
    left = f"{n_left} to train, {runner.jobs} at once" if n_left else "nothing to train"
    print(f"{study.name} in {study.out}: {plural(len(study.runs), 'run')}, {n_done} finished; {left}", flush=True)
    try:
        with _display(runner) as tell:
            runner.train(tell)
    except KeyboardInterrupt:
        print("interrupted; what ran is saved, and the same command continues", file=sys.stderr)
        return 130
    rows, text = write_tables(study)
    print(f"\n{text}\n\nwrote {study.out / 'table.md'}, table.json, study.html")
    _advise(study, rows, config)
    return int(any(row.state == "failed" for row in rows))


_ADVICE = """
{% for row in rows if row.cause %}
{{ row.run.name }} is {{ row.state }}: {{ row.cause }}
{% endfor %}
{% for state, option in (("missing", ""), ("stale", " --rerun stale"), ("failed", " --rerun failed")) %}
{% for row in rows if row.state == state %}
{% if loop.first %}{{ loop.length | plural("run") }} {{ state }}; to train: {{ again }}{{ option }}{% endif %}

{% endfor %}
{% endfor %}
{% if study.config.law and not study.prediction.is_file() %}
{{ study.config.law.held_out }} starts after its prediction: {{ predict }}
{% endif %}
"""


def _advise(study: Study, rows: list[Row], config: str) -> None:
    """Say why runs are not finished, and what to do about it."""
    from moe_gpt.report.words import paragraphs

    again, predict = (command_line("study", name, config, "--out", study.out) for name in ("run", "predict"))
    for line in paragraphs(_ADVICE, rows=rows, study=study, again=again, predict=predict):
        print(line)


@contextlib.contextmanager
def _display(runner: Runner) -> Iterator[Callable[[Planned | None], None]]:
    """Show progress: a table that changes where stderr is a terminal, otherwise a line for each run that ends."""
    if not sys.stderr.isatty():
        yield lambda run: print(f"{run.name} {_progress(runner, runner.states[run.name])}", flush=True) if run else None
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        yield lambda run: live.update(_table(runner), refresh=True)


def _progress(runner: Runner, state: str) -> str:
    numbers = [f"{len(runner.those(other))} {other}" for other in ("running", "waiting")]
    if runner.seconds_left is not None:
        numbers.append(f"about {datetime.timedelta(seconds=round(runner.seconds_left))} left")
    return f"{state} ({', '.join(numbers)})"


def _table(runner: Runner) -> str:
    """Return how many runs of each arm are in each state."""
    import pandas as pd

    arms = pd.Series([run.arm for run in runner.study.runs], name="arm")
    states = pd.Series([runner.states[run.name] for run in runner.study.runs], name="state")
    return f"{pd.crosstab(arms, states).to_string()}\n{_progress(runner, runner.study.name)}"


def show(config: str, *, out: Path | None = None, json: Path | None = None) -> None:
    """Print the tables of a study as it is now, and write them as table.md, table.json and study.html.

    Args:
        config: A study's YAML file, or the name of one that comes with moe_gpt.
        out: Folder of the runs and tables.
        json: File for the JSON, instead of OUT/table.json.
    """
    study = _load(config, out)
    from moe_gpt.studies.tables import write_tables

    rows, text = write_tables(study, json)
    print(text)
    _advise(study, rows, config)


def list_(config: str, *, out: Path | None = None, commands: Switch = False) -> None:
    """Print the runs of a study with their states.

    Args:
        config: A study's YAML file, or the name of one that comes with moe_gpt.
        out: Folder of the runs and tables.
        commands: Print one ordinary command for each run that is not finished, for a job array. It needs the runs that
            others start with to be finished.
    """
    study = _load(config, out)
    from moe_gpt.studies.results import look
    from moe_gpt.terminal.tables import format_table

    rows = look(study)
    if commands:
        print(*(_command(row.run) for row in rows if row.state != "finished"), sep="\n")
        return
    cells = [(row.run.name, row.state, f"{row.run.flops:.3g}", row.cause) for row in rows]
    print(format_table(("run", "state", "FLOPs", ""), cells))


def _command(run: Planned) -> str:
    start = ["--init-from", run.parent] if run.parent else []
    words = [run.base, "--run-dir", run.folder, "--resume", *start, *run.overrides]
    return f"OMP_NUM_THREADS=1 {command_line('train', *words)}"


def predict(config: str, *, out: Path | None = None) -> None:
    """Predict the held-out run of a study from its finished ladder, before that run may start.

    Args:
        config: A study's YAML file.
        out: Folder of the runs and tables.
    """
    study = _load(config, out)
    from moe_gpt.studies.prediction import write_prediction

    told = write_prediction(study)
    interval = (
        "" if told["interval"] is None else f", 95 % interval {told['interval'][0]:.4f} to {told['interval'][1]:.4f}"
    )
    print(f"predicted loss {told['loss']:.4f}{interval} (a power law without floor: {told['power_law']:.4f})")
    print(f"wrote {study.prediction}; next:\n  {command_line('study', 'run', config, '--out', study.out)}")


def coordinates(config: str, *, out: Path | None = None, json: Path | None = None) -> None:
    """Measure how activations grow with the width, with standard parametrisation and with muP.

    Args:
        config: A study's YAML file with a section coordinates.
        out: Folder of the runs and tables.
        json: File for the slopes.
    """
    study = _load(config, out)
    from moe_gpt.studies import coordinates as check

    slopes = check.coordinates(study)
    print(json_format.dumps(slopes, indent=2))
    if json:
        json.write_text(json_format.dumps(slopes, indent=2) + "\n", encoding="utf-8")


def speeds(config: str, *arms: str, out: Path | None = None, rounds: Whole = 20) -> None:
    """Measure how fast arms of a study train, on one thread and in turns; the tables then have it.

    Args:
        config: A study's YAML file, or the name of one that comes with moe_gpt.
        arms: Two or more; the others are held against the first.
        out: Folder of the runs and tables.
        rounds: Steps of each arm.
    """
    study = _load(config, out)
    from moe_gpt.studies.speeds import write_speeds

    for arm, found in write_speeds(study, arms, rounds).items():
        low, high = found["interval"]
        micros = 1e6 * found["cpu_seconds_per_token"]
        print(f"{arm}: {micros:.1f} µs of CPU a token, speed {found['speed']:.3f} ({low:.3f} to {high:.3f})")


def documents(config: str, *, out: Path | None = None) -> None:
    """Measure the differences of a study's arms over held-out documents, drawn again; the tables then have it.

    Args:
        config: A study's YAML file, or the name of one that comes with moe_gpt.
        out: Folder of the runs and tables.
    """
    study = _load(config, out)
    from moe_gpt.studies.documents import write_documents

    for entry in write_documents(study):
        low_high = entry["interval"]
        interval = "none, fewer than 5" if low_high is None else f"{low_high[0]:+.4f} to {low_high[1]:+.4f}"
        print(f"{entry['name']}, {entry['source']}: {entry['difference']:+.4f} (interval over documents: {interval})")
