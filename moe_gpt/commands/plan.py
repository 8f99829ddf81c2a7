"""Say what a run takes before paying for it: python scripts/plan.py --config gpt4.yaml --n-gpus 25000 --tensor 8."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from moe_gpt.commands.cli import ArgumentParser, count_argument
from moe_gpt.config.yaml import load_run_config


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
    group.add_argument("--n-gpus", type=int, help="(default: tensor x pipeline x expert)")
    for name in ("tensor", "pipeline", "expert"):
        group.add_argument(f"--{name}", type=int, default=1, help=f"{name}-parallel GPUs (default: 1)")
    group.add_argument("--zero", default="1", help="0, 1, 2, 3 or fsdp (default: 1)")
    group.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation (default: 0.4)")
    group.add_argument("--price", type=float, default=1.0, help="dollars per GPU-hour (default: 1)")
    group.add_argument("--context", type=count_argument, help="of FLOPs per token and of serving (default: last stage)")
    group.add_argument("--tokens", type=float, help="training tokens (default: the schedule's)")
    group.add_argument("--days", type=float, help="also: the MFU of a run that took so many days")
    group.add_argument("--budget", type=float, help="also: the tokens that so many dollars pay for")
    group.add_argument(
        "--recompute", action=argparse.BooleanOptionalAction, help="activations (default: as the config)"
    )
    group.add_argument("--micro-batch-sequences", type=count_argument, default=1, help="(default: 1)")
    group.add_argument("--gpu-hours-between-failures", type=float, default=50_000.0, help="(default: 50,000)")
    group.add_argument("--restart-seconds", type=float, default=900.0, help="after a failure (default: 900)")
    group.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, help="that a save stops training (default: 60)"
    )
    group.add_argument("--checkpoint-interval-seconds", type=float, help="(default: the best)")


def _serving_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--serve-gpus", type=int, help="GPUs of the cluster (default: those of one copy)")
    group.add_argument("--serve-tensor", type=int, help="(default: as in training)")
    group.add_argument("--serve-pipeline", type=int, help="(default: as in training)")
    group.add_argument("--batch", type=count_argument, default=64, help="sequences served together (default: 64)")
    group.add_argument("--acceptance", type=float, default=0.8, help="of drafted tokens (default: 0.8)")
    group.add_argument("--draft-cost", type=float, default=0.05, help="draft step over model step (default: 0.05)")
    group.add_argument("--gamma", type=int, default=4, help="tokens drafted at a time (default: 4)")


def main() -> None:
    """Print the plan, the forecast, or the explanation of a number."""
    arguments = parse_arguments()

    from moe_gpt.errors import InputError
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
    from moe_gpt.errors import InputError
    from moe_gpt.plan.hardware import Parallelism, find_gpu
    from moe_gpt.plan.plan import PlanOptions, plan_run
    from moe_gpt.plan.training_cost import Failures

    if not arguments.config:
        raise InputError("--config is needed for a plan; --extrapolate works without one")
    if arguments.set:
        raise InputError(f"--set is for --extrapolate, got {arguments.set[0]}; settings of the config go without it")
    a = arguments
    zero: Any = int(a.zero) if a.zero.isdecimal() else a.zero
    n_gpus = a.tensor * a.pipeline * a.expert if a.n_gpus is None else a.n_gpus
    layout = Parallelism(n_gpus, a.tensor, a.pipeline, a.expert, zero)
    tensor = a.tensor if a.serve_tensor is None else a.serve_tensor
    pipeline = a.pipeline if a.serve_pipeline is None else a.serve_pipeline
    try:
        serving = Parallelism(tensor * pipeline if a.serve_gpus is None else a.serve_gpus, tensor, pipeline)
    except InputError as error:
        raise InputError(f"--serve-gpus, --serve-tensor, --serve-pipeline: {error}") from None
    options = PlanOptions(
        gpu=find_gpu(a.gpu),
        layout=layout,
        serving=serving,
        mfu=a.mfu,
        price=a.price,
        context=a.context,
        tokens=a.tokens,
        recompute=a.recompute,
        micro_batch_sequences=a.micro_batch_sequences,
        failures=Failures(
            a.gpu_hours_between_failures, a.restart_seconds, a.checkpoint_seconds, a.checkpoint_interval_seconds
        ),
        duration_seconds=None if a.days is None else a.days * 86_400,
        budget=a.budget,
        batch=a.batch,
        acceptance=a.acceptance,
        draft_cost=a.draft_cost,
        gamma=a.gamma,
    )
    return plan_run(load_run_config(a.config, a.overrides), options)


def forecast(given: list[str]) -> list:
    """Return the forecast of 2020 with the inputs that were given."""
    from moe_gpt.errors import InputError
    from moe_gpt.plan.scaling_laws import extrapolate

    known = list(inspect.signature(extrapolate).parameters)
    inputs: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            inputs[name] = float(value)
        except ValueError:
            raise InputError(f"--set takes NAME=NUMBER, got {text}") from None
        if name not in known:
            raise InputError(f"--set: there is no input {name!r}; choose one of {', '.join(known)}")
    return [extrapolate(**inputs)]
