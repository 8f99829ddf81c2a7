"""A study as it is planned: the arms, seeds and comparisons of a YAML file, and the ordinary runs that they take."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field

from moe_gpt.config import RunConfig
from moe_gpt.config.section import Count, Positive, Problem, Section, Seed, one_of, unless
from moe_gpt.config.yaml import CONFIGS, find_config, load_run_config, parse_yaml, to_plain
from moe_gpt.errors import ConfigError, InputError
from moe_gpt.measure.flops import stage_tokens, training_flops
from moe_gpt.measure.parameters import count_parameters, model_of
from moe_gpt.studies.law import LEAST_SIZES

EACH, MEAN = "all", "mean"
"""Of sources: a comparison for each of them, and one of their mean."""
SPENT = ("tokens", "flops", "cpu_seconds", "steps")
"""What a run has spent, in tokens, FLOPs, seconds and optimizer steps."""
Seeds = tuple[Seed, ...]


def _is_published(value: dict[str, Any]) -> dict[str, Any]:
    if value.keys() != {"difference", "from"} or not isinstance(value["from"], str):
        raise ValueError
    return value | {"difference": float(value["difference"])}


Published = Annotated[
    dict[str, Any],
    AfterValidator(_is_published),
    Field(title='a number and its origin, such as {difference: -0.05, from: "arXiv 2101.03961, table 1"}'),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmConfig(Section):
    """What is the same in all runs of an arm."""

    base: str | None = None
    """Config of the runs, beside the study's file or shipped; the study's by default."""
    overrides: tuple[str, ...] = ()
    """Settings over those of the base and of the study, as key.path=value."""
    seeds: Seeds = ()
    """The study's by default."""
    init_from: str | None = None
    """Arm whose finished run of the same seed gives the weights at the start."""


class Moment(NamedTuple):
    """When runs are compared: at their end, after so many tokens, or where their loss is so low."""

    tokens: int | None = None
    loss: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonConfig(Section):
    """A claim about two arms: the difference is the second one's mean minus the first one's."""

    name: str
    """In words."""
    arms: tuple[str, str]
    """The control and the arm that the claim is about."""
    claim: Literal["lower", "equivalent", "differs"] = "differs"
    """The second arm is lower, lies within the margin, or differs."""
    margin: Positive | None = None
    """Of equivalence, stated before the runs."""
    published: Published | None = None
    """What others found."""
    measure: str = "ce_loss"
    """A key of evaluations: ce_loss, bits_per_byte, max_violation; with at_loss tokens, flops, cpu_seconds or steps."""
    source: str = EACH
    """all (a comparison for each source), mean (of the sources), or one of them."""
    at_loss: Positive | None = None
    """Compare what the arms have spent where the source's ce_loss first falls to this, between two evaluations."""
    at_tokens: Count | None = None
    """Compare the last evaluations up to so many tokens, instead of those at the end."""

    @property
    def moment(self) -> Moment:
        """When the arms are compared."""
        return Moment(self.at_tokens, self.at_loss)

    def problems(self) -> Iterator[Problem]:
        """Yield claims that cannot be tested."""
        text = "margin is required with claim=equivalent: the largest difference that does not matter, such as 0.02"
        yield from unless(self.claim != "equivalent" or self.margin is not None, text, "margin", "claim")
        text = f"measure must be {', '.join(SPENT)} with at_loss and something else without it, got {self.measure}"
        yield from unless((self.measure in SPENT) == bool(self.at_loss), text, "measure", "at_loss")
        yield from one_of(self, "at_loss", "at_tokens")
        text = f"arms must be two different arms, got {self.arms[0]} twice"
        yield from unless(self.arms[0] != self.arms[1], text, "arms")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LawConfig(Section):
    """A scaling law of a ladder of arms, which predicts a larger one."""

    ladder: tuple[str, ...]
    """Arms of growing compute."""
    held_out: str
    """Arm whose runs start after the prediction is written."""
    measure: str = "ce_loss"
    """A key of evaluations."""
    source: str = MEAN
    """mean (of the sources), or one of them."""

    def problems(self) -> Iterator[Problem]:
        """Yield ladders that no law can be fitted to."""
        n, text = len(set(self.ladder)), f"ladder must be at least {LEAST_SIZES} different arms"
        yield from unless(LEAST_SIZES <= n == len(self.ladder), f"{text}, got {', '.join(self.ladder)}", "ladder")
        text = f"held_out must not be in the ladder that predicts it, got {self.held_out}"
        yield from unless(self.held_out not in self.ladder, text, "held_out", "ladder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinatesConfig(Section):
    """The coordinate check of muP."""

    widths: tuple[Count, ...]
    """Values of d_model; heads and d_ff go with it."""
    of_arm: str | None = None
    """Whose model, text and learning rate it takes; those of the first arm by default."""
    seeds: Seeds = (0, 1, 2)
    """Of initial weights and tokens."""
    steps: Count = 10
    """Before the activations are measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(ArmConfig):
    """A study as its file has it."""

    arms: dict[str, ArmConfig]
    """By name."""
    comparisons: tuple[ComparisonConfig, ...] = ()
    """The rows of the table."""
    law: LawConfig | None = None
    """A prediction."""
    coordinates: CoordinatesConfig | None = None
    """The coordinate check of muP."""

    def seeds_of(self, arm: str) -> Seeds:
        """Return the seeds of an arm."""
        return self.arms[arm].seeds or self.seeds

    def problems(self) -> Iterator[Problem]:
        """Yield names that are none, and arms that have no runs."""
        text = "init_from is for an arm, which starts with the runs of another arm; here it has no meaning"
        yield from unless(self.init_from is None, text, "init_from")
        for arm in self.arms:
            yield from self._problems_of(arm)
        for key, arm in self._named():
            text = f"{key} must be arms of this study ({', '.join(self.arms)}), got {arm}"
            yield from unless(arm in self.arms, text, key)

    def _named(self) -> Iterator[tuple[str, str]]:
        """Yield the arms that others name, with the keys."""
        yield from ((f"arms.{name}.init_from", arm.init_from) for name, arm in self.arms.items() if arm.init_from)
        for index, comparison in enumerate(self.comparisons):
            yield from zip(itertools.repeat(f"comparisons.{index}.arms"), comparison.arms)
        if self.law:
            yield from zip(itertools.repeat("law.ladder"), self.law.ladder)
            yield "law.held_out", self.law.held_out
        if self.coordinates and self.coordinates.of_arm:
            yield "coordinates.of_arm", self.coordinates.of_arm

    def _problems_of(self, arm: str) -> Iterator[Problem]:
        key, seeds = f"arms.{arm}", self.seeds_of(arm)
        text = f"{key}: an arm is the name of a folder, of letters, digits, _, - and dots inside, got {arm!r}"
        yield from unless(re.fullmatch(r"\w[\w.-]*", str(arm), re.ASCII) is not None, text, key)
        yield from unless(bool(seeds), f"{key}.seeds is required where the study has no seeds", f"{key}.seeds")
        again = [str(seed) for seed, n in Counter(seeds).items() if n > 1]
        yield from unless(not again, f"{key}.seeds: give each seed once, got {', '.join(again)} again", f"{key}.seeds")
        text = f"{key}.base is required where the study has no base: a config such as tiny.yaml"
        yield from unless(bool(self.arms[arm].base or self.base), text, f"{key}.base")
        yield from self._problems_of_start(arm, f"{key}.init_from")

    def _problems_of_start(self, arm: str, key: str) -> Iterator[Problem]:
        """Yield a circle of arms that start with one another, and seeds that the other arm lacks."""
        line = [arm]
        while (start := self.arms[line[-1]].init_from) in self.arms and start not in line:
            line.append(str(start))
        text = f"{key}: arms start with one another in a circle: {' <- '.join([*line, str(start)])}"
        yield from unless(start not in line, text, key)
        missing = set(self.seeds_of(arm)) - set(self.seeds_of(line[1] if len(line) > 1 else arm))
        text = f"{key}: {line[-1]} needs the seeds of {arm}, and lacks {', '.join(map(str, sorted(missing)))}"
        yield from unless(not missing, text, key)


class Planned(NamedTuple):
    """An ordinary run that a study takes."""

    arm: str
    seed: int
    base: Path
    overrides: tuple[str, ...]
    config: RunConfig
    folder: Path
    parent: Path | None
    """Run that it starts with."""

    @property
    def name(self) -> str:
        """Arm and seed."""
        return self.folder.name

    @property
    def start(self) -> str | None:
        """Arm that it starts with."""
        return self.parent.name.rpartition("-")[0] if self.parent else None

    @property
    def flops(self) -> int:
        """Of the whole schedule; where that ends with the data, as if its last stage had one token."""
        model, stages = model_of(self.config), self.config.schedule.stages
        ends = [stage.end or 0 for stage in stages]
        tokens = None if stages[-1].end else max(ends) + 1
        return training_flops(model, stage_tokens(self.config.schedule, tokens), count_parameters(model))


class Study(NamedTuple):
    """A study and its runs."""

    name: str
    config: StudyConfig
    out: Path
    """Folder of the runs and tables."""
    runs: tuple[Planned, ...]
    """In the order of the file."""

    @property
    def prediction(self) -> Path:
        """The file of the law's prediction."""
        return self.out / "prediction.json"

    @property
    def speeds(self) -> Path:
        """The file of the arms' speeds."""
        return self.out / "speeds.json"

    @property
    def documents(self) -> Path:
        """The file of the differences over held-out documents."""
        return self.out / "documents.json"


def load_study(name: str | Path, out: Path | None = None) -> Study:
    """Read a study and the configs of its runs.

    Args:
        name: a file, or the name of a study that comes with moe_gpt.
        out: folder of runs and tables; studies/ and the study's name by default.

    Raises:
        ConfigError: with a line for each problem.
        FileNotFoundError: if there is no such file.
    """
    path = next(filter(Path.is_file, _places(str(name), CONFIGS / "studies")), None)
    if path is None:
        known = ", ".join(sorted(file.name for file in CONFIGS.glob("studies/*.yaml")))
        raise FileNotFoundError(f"no study at {name} and none of that name in {CONFIGS / 'studies'}, which has {known}")
    config = StudyConfig.from_mapping(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    out = out or Path("studies") / path.stem
    return Study(path.stem, config, out, tuple(_plan(config, path.parent, out)))


def _plan(config: StudyConfig, folder: Path, out: Path) -> list[Planned]:
    """Return all runs, or raise ``ConfigError`` with what is wrong in any arm."""
    runs: list[Planned] = []
    problems: list[str] = []
    for arm in config.arms:
        try:
            runs += _runs_of(config, arm, folder, out)
        except (InputError, FileNotFoundError) as error:
            problems += [f"arms.{arm}: {text}" for text in getattr(error, "problems", [str(error)])]
    problems += _same(runs)
    if problems:
        raise ConfigError(problems)
    return runs


def _places(name: str, shipped: Path) -> Iterator[Path]:
    yield from (Path(name), shipped / name, shipped / f"{name}.yaml")


def _runs_of(study: StudyConfig, arm: str, folder: Path, out: Path) -> Iterator[Planned]:
    own = study.arms[arm]
    name = str(own.base or study.base)
    base = folder / name if (folder / name).is_file() else find_config(name)
    for seed in study.seeds_of(arm):
        overrides = (*study.overrides, *own.overrides, f"train.seed={seed}")
        config = load_run_config(base, overrides)
        parent = out / f"{own.init_from}-{seed}" if own.init_from else None
        yield Planned(arm, seed, base, overrides, config, out / f"{arm}-{seed}", parent)


def _same(runs: Sequence[Planned]) -> Iterator[str]:
    """Yield arms whose runs are those of another arm: they would count twice."""
    first: dict[str, Planned] = {}
    for run in runs:
        for same in (json.dumps([to_plain(run.config), run.start], sort_keys=True), run.name.lower()):
            one = first.setdefault(same, run)
            if one.arm != run.arm:
                yield f"arms.{run.arm} has the same run as arms.{one.arm}, with seed {one.seed}; give one of them"
