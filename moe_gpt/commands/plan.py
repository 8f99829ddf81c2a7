"""Say what a run takes before paying for it: python scripts/plan.py --config gpt4.yaml --n-gpus 25000 --tensor 8."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from moe_gpt.commands.cli import ArgumentParser
from moe_gpt.config.section import Section, default_of, field_docs
from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import InputError
from moe_gpt.plan.hardware import Parallelism, find_gpu
from moe_gpt.plan.options import Failures, PlanOptions

_OF_TRAINING = {name: name for name in ("mfu", "price", "context", "tokens", "budget", "micro_batch_sequences")}
_OF_FAILURES = {
    "gpu_hours_between": "gpu_hours_between_failures",
    "restart_seconds": "restart_seconds",
    "checkpoint_seconds": "checkpoint_seconds",
    "interval_seconds": "checkpoint_interval_seconds",
}
_OF_SERVING = {name: name for name in ("batch", "acceptance", "draft_cost", "gamma")}
"""Fields of the plan's options that are arguments, and the arguments' names."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="The reported system: --config gpt4.yaml --n-gpus 25000 --tensor 8 --pipeline 15 --mfu 0.34 --price 1. "
        "Every number has a name; --explain NAME says how it is computed and where the formula is from.",
    )
    parser.add_argument("--config", help="path of a YAML file, or a name in configs/")
    parser.add_argument("--json", action="store_true", help="JSON alone, in base units: FLOPs, bytes, seconds, dollars")
    parser.add_argument("--explain", metavar="NAME", help="formula and source of a number of the plan")
    parser.add_argument("--extrapolate", action="store_true", help="the forecast of 2020 instead of a plan")
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="with --extrapolate: another input"
    )
    _training_arguments(parser.add_argument_group("training"))
    _serving_arguments(parser.add_argument_group("serving"))
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings over the file's")
    return parser.parse_intermixed_args()


def _training_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gpu",
        default="a100-80gb",
        help="a name of the table, cpu (measured), or name=mine,memory=96e9,flops=4e14,bandwidth=2e12,link=4e11,"
        "network=5e10 (default: a100-80gb)",
    )
    group.add_argument("--n-gpus", type=int, help="GPUs of the cluster (default: tensor x pipeline x expert)")
    for name in ("tensor", "pipeline", "expert"):
        group.add_argument(f"--{name}", type=int, default=1, help=f"{name}-parallel GPUs (default: 1)")
    group.add_argument("--zero", default="1", help="0, 1, 2, 3 or fsdp (default: 1)")
    group.add_argument("--days", type=float, help="Also say the MFU of a run that took so many days.")
    group.add_argument("--recompute", action=argparse.BooleanOptionalAction, help=field_docs(PlanOptions)["recompute"])
    _add_options(group, PlanOptions, _OF_TRAINING)
    _add_options(group, Failures, _OF_FAILURES)


def _serving_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--serve-gpus", type=int, help="GPUs of the cluster (default: those of one copy)")
    group.add_argument("--serve-tensor", type=int, help="GPUs that share a layer (default: as in training)")
    group.add_argument("--serve-pipeline", type=int, help="stages of a copy (default: as in training)")
    _add_options(group, PlanOptions, _OF_SERVING)


def _add_options(group: argparse._ArgumentGroup, section: type[Section], arguments: Mapping[str, str]) -> None:
    """Add an argument for each of the fields, described by the field's docstring; the section checks the values."""
    docs, fields = field_docs(section), {field.name: field for field in dataclasses.fields(section)}
    for name, argument in arguments.items():
        default = default_of(fields[name])
        shown = "" if default is None else f" (default: {default:,g})"
        group.add_argument(f"--{argument.replace('_', '-')}", help=(docs[name] + shown).replace("%", "%%"))


def _given(arguments: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields whose arguments were given; the others keep the section's defaults."""
    values = {name: getattr(arguments, argument) for name, argument in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def main() -> None:
    """Print the plan, the forecast, or the explanation of a number."""
    arguments = parse_arguments()

    from moe_gpt.plan.plan import describe
    from moe_gpt.plan.quantities import explain, to_json

    if arguments.explain is not None and arguments.json:
        raise InputError("--explain is for people: give it without --json")
    if arguments.extrapolate and arguments.config:
        raise InputError(f"--extrapolate takes no config, got --config {arguments.config}")
    sections = forecast(arguments.set) if arguments.extrapolate else plan(arguments)
    if arguments.explain is not None:
        print(explain(sections, arguments.explain))
    elif arguments.json:
        print(json.dumps(to_json(sections), indent=2))
    else:
        print(describe(sections))


def plan(arguments: argparse.Namespace) -> list:
    """Return the sections of a config's plan."""
    from moe_gpt.plan.plan import plan_run

    if not arguments.config:
        raise InputError("--config is needed for a plan; --extrapolate works without one")
    if arguments.set:
        raise InputError(f"--set is for --extrapolate, got {arguments.set[0]}; settings of the config go without it")
    options = PlanOptions(
        gpu=find_gpu(arguments.gpu),
        layout=_training_layout(arguments),
        serving=_serving_layout(arguments),
        recompute=arguments.recompute,
        duration_seconds=None if arguments.days is None else arguments.days * 86_400,
        failures=Failures(**_given(arguments, _OF_FAILURES)),
        **_given(arguments, _OF_TRAINING | _OF_SERVING),
    )
    return plan_run(load_run_config(arguments.config, arguments.overrides), options)


def _training_layout(arguments: argparse.Namespace) -> Parallelism:
    tensor, pipeline, expert = arguments.tensor, arguments.pipeline, arguments.expert
    n_gpus = tensor * pipeline * expert if arguments.n_gpus is None else arguments.n_gpus
    zero: Any = int(arguments.zero) if arguments.zero.isdecimal() else arguments.zero
    return Parallelism(n_gpus, tensor, pipeline, expert, zero)


def _serving_layout(arguments: argparse.Namespace) -> Parallelism:
    tensor = arguments.tensor if arguments.serve_tensor is None else arguments.serve_tensor
    pipeline = arguments.pipeline if arguments.serve_pipeline is None else arguments.serve_pipeline
    try:
        return Parallelism(
            tensor * pipeline if arguments.serve_gpus is None else arguments.serve_gpus, tensor, pipeline
        )
    except InputError as error:
        raise InputError(f"--serve-gpus, --serve-tensor, --serve-pipeline: {error}") from None


def forecast(given: list[str]) -> list:
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
