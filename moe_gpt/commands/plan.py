"""``moe-gpt plan``: estimate time, memory and cost of a run before paying for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from moe_gpt.commands.options import AboveZero, Switch, Whole, Words, flat, read_as
from moe_gpt.config.section import NonNegative, Rate
from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import InputError
from moe_gpt.plan.hardware import Parallelism, find_gpu
from moe_gpt.plan.options import DraftedTokens, Failures, PlanOptions, Utilisation

if TYPE_CHECKING:
    from moe_gpt.config import RunConfig
    from moe_gpt.plan.quantities import PlanSection

OUTPUT, CLUSTER, TRAINING, FAILURES, SERVING = (
    Group.create_ordered(name) for name in ("Output", "The cluster", "Training", "Failures", "Serving")
)


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """Which numbers are printed, and how."""

    all: Annotated[Switch, Parameter(group=OUTPUT)] = False
    """Print every number of the plan instead of the short answer."""
    json: Annotated[Switch, Parameter(group=OUTPUT)] = False
    """Print every number as JSON and nothing else, in base units: FLOPs, bytes, seconds, dollars."""
    explain: Annotated[str | None, Parameter(group=OUTPUT)] = None
    """Print formula and source of the number with this name."""
    extrapolate: Annotated[Switch, Parameter(group=OUTPUT)] = False
    """Instead of a plan, print the forecast of 2020 for the model after GPT-3, if it grows as much as GPT-3 did from
    GPT-2. This option needs no config."""
    set: Annotated[Words, Parameter(group=OUTPUT)] = ()
    """With --extrapolate: change an input of the forecast, as NAME=VALUE."""

    def check(self, config: str | None) -> None:
        """Check that the options fit together.

        Raises:
            InputError: naming the option that does not fit.
        """
        if self.explain is not None and self.json:
            raise InputError("--explain prints text for people; leave --json out")
        if self.extrapolate and config:
            raise InputError(f"--extrapolate takes no config, got {config}")
        if self.set and not self.extrapolate:
            raise InputError(f"--set is for --extrapolate, got {self.set[0]}; settings of a config need no --set")
        if not (config or self.extrapolate or self.explain):
            raise InputError("CONFIG is missing: a plan needs a config, such as small.yaml; --extrapolate needs none")

    def text(self, sections: list[PlanSection], options: PlanOptions | None = None) -> str:
        """Return every number of a plan, or all about one."""
        from moe_gpt.plan.plan import describe
        from moe_gpt.plan.quantities import explain, to_json

        if self.explain is not None:
            return explain(sections, self.explain)
        return json.dumps(to_json(sections), indent=2) if self.json else describe(sections, options)


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster that trains."""

    gpu: Annotated[str, Parameter(group=CLUSTER)] = "a100-80gb"
    """A GPU of the planner's table; cpu, which is measured; or a GPU of your own, with name, memory, flops, bandwidth,
    link and network, as name=mine,memory=96e9 and so on."""
    n_gpus: Annotated[Whole | None, Parameter(group=CLUSTER)] = None
    """GPUs of the cluster; tensor x pipeline x expert by default."""
    tensor: Annotated[Whole, Parameter(group=CLUSTER)] = 1
    """Tensor-parallel GPUs."""
    pipeline: Annotated[Whole, Parameter(group=CLUSTER)] = 1
    """Pipeline-parallel GPUs."""
    expert: Annotated[Whole, Parameter(group=CLUSTER)] = 1
    """Expert-parallel GPUs."""
    zero: Annotated[Literal["0", "1", "2", "3", "fsdp"], Parameter(group=CLUSTER)] = "1"
    """Stage of ZeRO, or fsdp."""

    def layout(self) -> Parallelism:
        """Return how training is spread over the GPUs."""
        n_gpus = self.tensor * self.pipeline * self.expert if self.n_gpus is None else self.n_gpus
        zero: Any = int(self.zero) if self.zero.isdecimal() else self.zero
        return Parallelism(n_gpus, self.tensor, self.pipeline, self.expert, zero)


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Assumptions about training; the defaults are those of ``PlanOptions``."""

    mfu: Annotated[Utilisation | None, read_as(Utilisation), Parameter(group=TRAINING)] = None
    """Model FLOPs utilisation: the share of all GPUs' peak that training uses, at 6 FLOPs for each active parameter and
    token. 0.4 by default; on cpu, the MFU that was measured for this width."""
    price: Annotated[AboveZero | None, Parameter(group=TRAINING)] = None
    """Dollars per GPU-hour; 1 by default."""
    context: Annotated[Whole | None, Parameter(group=TRAINING)] = None
    """Positions that a token attends to; the last stage's sequence length by default."""
    tokens: Annotated[AboveZero | None, Parameter(group=TRAINING)] = None
    """Training tokens; those of the schedule by default. A schedule without an end takes all that the sources give."""
    budget: Annotated[AboveZero | None, Parameter(group=TRAINING)] = None
    """Also print the number of tokens that this many dollars pay for."""
    days: Annotated[AboveZero | None, Parameter(group=TRAINING)] = None
    """Also print the MFU that a run of this many days needs."""
    recompute: Annotated[bool | None, Parameter(group=TRAINING)] = None
    """Recompute activations in the backward pass; the config has the default."""
    micro_batch_sequences: Annotated[Whole | None, Parameter(group=TRAINING)] = None
    """Sequences of one forward pass; 1 by default."""


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class OfFailures:
    """How often the run breaks; the defaults are those of ``Failures``."""

    gpu_hours_between_failures: Annotated[AboveZero | None, Parameter(group=FAILURES)] = None
    """Mean GPU hours between two failures; 50,000 by default."""
    restart_seconds: Annotated[AboveZero | None, Parameter(group=FAILURES)] = None
    """Seconds from a failure to the next useful step; 900 by default."""
    checkpoint_seconds: Annotated[AboveZero | None, Parameter(group=FAILURES)] = None
    """Seconds for which a checkpoint stops training; 60 by default."""
    checkpoint_interval_seconds: Annotated[
        AboveZero | None, Parameter(name=("--interval", "--checkpoint-interval-seconds"), group=FAILURES)
    ] = None
    """Seconds between the ends of two checkpoints; by default, the interval that loses the least time."""

    def failures(self) -> Failures:
        """Return how often the run breaks."""
        names = {"gpu_hours_between_failures": "gpu_hours_between", "checkpoint_interval_seconds": "interval_seconds"}
        return Failures(**{names.get(name, name): value for name, value in _given(self).items()})


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """How the model is served; the defaults are those of ``PlanOptions``."""

    serve_gpus: Annotated[Whole | None, Parameter(group=SERVING)] = None
    """GPUs that serve; those of one copy of the model by default."""
    serve_tensor: Annotated[Whole | None, Parameter(group=SERVING)] = None
    """GPUs that share a layer; as in training by default."""
    serve_pipeline: Annotated[Whole | None, Parameter(group=SERVING)] = None
    """Pipeline stages of a copy; as in training by default."""
    batch: Annotated[Whole | None, Parameter(group=SERVING)] = None
    """Sequences that pass through a pipeline stage together; 64 by default."""
    acceptance: Annotated[Rate | None, read_as(Rate), Parameter(group=SERVING)] = None
    """Probability that a drafted token is accepted; 0.8 by default."""
    draft_cost: Annotated[NonNegative | None, read_as(NonNegative), Parameter(group=SERVING)] = None
    """Time of a draft model's step, as a share of a step of the model; 0.05 by default."""
    gamma: Annotated[DraftedTokens | None, read_as(DraftedTokens), Parameter(group=SERVING)] = None
    """Tokens drafted at a time; 4 by default."""

    def layout(self, training: Cluster) -> Parallelism:
        """Return how serving is spread over the GPUs."""
        tensor = training.tensor if self.serve_tensor is None else self.serve_tensor
        pipeline = training.pipeline if self.serve_pipeline is None else self.serve_pipeline
        try:
            return Parallelism(tensor * pipeline if self.serve_gpus is None else self.serve_gpus, tensor, pipeline)
        except InputError as error:
            raise InputError(f"--serve-gpus, --serve-tensor, --serve-pipeline: {error}") from None


def _given(options: Any, *without: str) -> dict[str, Any]:
    """Return the options that were given; for the others the planner's defaults hold."""
    values = {name: value for name, value in vars(options).items() if name not in without}
    return {name: value for name, value in values.items() if value is not None}


def plan(
    config: str | None = None,
    *overrides: str,
    shown: Shown = Shown(),
    cluster: Cluster = Cluster(),
    training: Training = Training(),
    failures: OfFailures = OfFailures(),
    serving: Serving = Serving(),
) -> None:
    """Estimate time, memory and cost of a run before paying for it.

    The reported GPT-4 system: moe-gpt plan gpt4.yaml --n-gpus 25000 --tensor 8 --pipeline 15 --mfu 0.34 --price 1. Each
    number has a name; --explain NAME prints its formula and the formula's source.

    Args:
        config: A YAML file, or the name of a config that comes with moe_gpt, such as gpt4.yaml.
        overrides: Settings that replace those of the file, as key.path=value.
    """
    from moe_gpt.plan.quantities import explain

    shown.check(config)
    if shown.extrapolate:
        print(shown.text(forecast(shown.set)))
    elif config is None:
        print(explain((), shown.explain or ""))
    else:
        print(plan_text(load_run_config(config, overrides), planned(cluster, training, failures, serving), shown))


def plan_text(config: RunConfig, options: PlanOptions, shown: Shown) -> str:
    """Return the plan in the form that the options choose."""
    from moe_gpt.plan.answer import answer
    from moe_gpt.plan.plan import plan_run
    from moe_gpt.plan.quantities import explain

    known = explain((), shown.explain) if shown.explain else ""  # a wrong name is reported before the plan's errors
    try:
        sections = plan_run(config, options)
    except InputError:
        if known:
            return known
        raise
    if shown.all or shown.json or shown.explain:
        return shown.text(sections, options)
    return answer(config, options, sections)


def planned(cluster: Cluster, training: Training, failures: OfFailures, serving: Serving) -> PlanOptions:
    """Return the planner's options, with its defaults for those that were not given."""
    return PlanOptions(
        gpu=find_gpu(cluster.gpu),
        layout=cluster.layout(),
        serving=serving.layout(cluster),
        duration_seconds=None if training.days is None else training.days * 86_400,
        failures=failures.failures(),
        **_given(training, "days"),
        **_given(serving, "serve_gpus", "serve_tensor", "serve_pipeline"),
    )


def forecast(given: Sequence[str]) -> list:
    """Return the forecast of 2020 with the inputs that were given."""
    from moe_gpt.plan.scaling_laws import ForecastInputs, extrapolate

    known = [field.name for field in dataclasses.fields(ForecastInputs)]
    inputs: dict[str, Any] = dict(text.partition("=")[::2] for text in given)
    for name in inputs:
        if name not in known:
            raise InputError(f"--set: there is no input {name!r}; choose one of {', '.join(known)}")
    try:
        return [extrapolate(ForecastInputs(**inputs))]
    except InputError as error:
        raise InputError(f"--set NAME=NUMBER: {error}") from None
