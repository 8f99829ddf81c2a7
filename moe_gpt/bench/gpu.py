"""What there is to ask of a GPU, unattended and in ten minutes: ``moe-gpt bench gpu``; ``gpu.yaml`` has the stages."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import operator
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_gpt.bench import generate, train
from moe_gpt.bench.contenders import SHAPES, Ours, Workload
from moe_gpt.bench.processes import describe_machine, in_a_line
from moe_gpt.bench.results import Result
from moe_gpt.bench.rounds import Turns, timed
from moe_gpt.bench.stages import Stage, run_stages, tabulate_stages
from moe_gpt.config.yaml import parse_yaml
from moe_gpt.errors import InputError
from moe_gpt.files.durable import replace_file
from moe_gpt.inference.engine import Engine
from moe_gpt.inference.request import Request
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops import Visible, cuda
from moe_gpt.ops.device import Precision, describe_device, pick_device, pick_precision
from moe_gpt.plan.hardware import Parallelism, gpu_of
from moe_gpt.plan.memory import FLOAT32, MIXED_PRECISION, TrainingLayout, gpu_memory

_PEERS = ("transformers", "SDPA")  # where they do not run, no stage fails
_TABLE = parse_yaml(Path(__file__).with_name("gpu.yaml").read_text(encoding="utf-8"), "gpu.yaml")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_STATE = {"bf16": MIXED_PRECISION, "fp32": FLOAT32}
_SPEED = re.compile(rb'"(?:tokens_per_second|cpu_seconds)": [^,}]*')


class Setup(NamedTuple):
    """Where to measure, in which precision, and how much (of ``gpu.yaml``)."""

    device: torch.device
    precision: Precision
    sizes: dict[str, Any]

    def workload(self, shape: str, compile: bool = False) -> Workload:
        """Return what takes training steps of a shape."""
        model, *batch = SHAPES[shape]
        n_sequences, length = self.sizes.get("batch", batch)
        micro_batch = min(n_sequences * length, self.sizes["micro_batch_tokens"])
        model = dataclasses.replace(model, **self.sizes["cut"])
        return Workload(model, n_sequences, length, str(self.device), self.precision, micro_batch, compile)


def bench_gpu(name: str, minutes: float, path: Path, say: Callable[[str], None]) -> list[str]:
    """Run all stages, write what is known into a JSON file after every result, say a table, and name what failed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may wait for a network
    device = pick_device(name)
    setup = Setup(device, pick_precision("auto", device), _TABLE.get(device.type, _TABLE["other"]))
    head = {"machine": describe_machine(), "device": describe_device(device), "precision": setup.precision}
    stages = [
        Stage(name, functools.partial(globals()[work], setup, **arguments), seconds)
        for name, (work, arguments, seconds) in _TABLE["stages"].items()
    ]
    rows = run_stages(
        stages, 58 * minutes,  # 2 seconds of each minute are for the start and the end
        lambda rows: replace_file(path, json.dumps({**head, "stages": rows}, indent=2) + "\n"), say,
    )  # fmt: skip
    say(tabulate_stages(rows))
    return [row["name"] for row in rows if row["status"] not in ("passed", "skipped")]


def _each(
    setup: Setup, names: Iterable[str], make: Callable[[str], Callable[[], Any]], show: Callable[[str, Turns], Result]
) -> Iterator[Result]:
    """Yield what contenders give, or why not, in turn in this process: to start others would take a GPU longer."""
    for name in names:
        turn = None  # what came before holds memory, and so does what was compiled for it
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        try:
            turn = make(name)
            values = [turn() for _ in range(setup.sizes["warmup"] + setup.sizes["turns"])]
            yield show(name, Turns(values[setup.sizes["warmup"] :], torch.cuda.max_memory_allocated()))
        except Exception as error:
            traceback.print_exc()
            yield {"name": name, "not_run" if name.startswith(_PEERS) else "failed": in_a_line(error)}


def run_gpu_tests(setup: Setup, folder: Path, tests: Path = Path(__file__).parents[2] / "tests") -> Iterator[Result]:
    """Run the tests marked gpu, and yield pytest's last line, and which tests failed."""
    if not (torch.cuda.is_available() and tests.is_dir()):
        yield {"name": "pytest", "skipped": f"needs CUDA and {tests}"}
        return
    files = [path for path in tests.rglob("test_*.py") if b"mark.gpu" in path.read_bytes()]
    done = _call(["pytest", "-o", "addopts=", "--import-mode=importlib", "-q", "-m", "gpu", *files])
    failed = {"failed": "; ".join(re.findall("^(?:FAILED|ERROR).*", done.stdout, re.M))} if done.returncode else {}
    yield {"name": done.stdout.strip().rpartition("\n")[2], **failed}


def _call(words: Iterable[object]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def train_shape(setup: Setup, folder: Path, shape: str, compile: bool, names: list[str]) -> Iterator[Result]:
    """Yield speed, MFU and memory of training steps of moe_gpt, its dense twin and transformers."""
    work, (peak, source) = setup.workload(shape, compile), peak_flops(setup)
    n_sequences = work.micro_batch_tokens // work.seq_len
    layout = TrainingLayout(Parallelism(1), False, n_sequences, work.seq_len, work.batch_tokens, _STATE[work.precision])

    def show(name: str, turns: Turns) -> Result:
        over_plan = turns.peak_memory_bytes / gpu_memory(train.model_of(work, name), layout, 0).total
        return train.result_of(name, turns, work, peak) | {"of": source, "memory_over_plan": over_plan}

    yield from _each(setup, names, functools.partial(train.make_step, work), show)


def peak_flops(setup: Setup) -> tuple[float, str]:
    """Return the FLOP/s that MFU is a share of, and whose they are."""
    if setup.precision == "bf16" and (gpu := gpu_of(describe_device(setup.device))):
        return gpu.bf16_flops, f"datasheet of {gpu.name}"
    return train.gemm_speed(setup.device, setup.precision, setup.sizes["product"]), "product measured here"


def repeat_a_run(setup: Setup, folder: Path) -> Iterator[Result]:
    """Train twice with ``train.deterministic``, and yield whether metrics and tensors have the same bytes."""
    for run in "ab":
        _train(setup, folder / run, "tiny.yaml", "train.deterministic=true")
    for name in ("metrics.jsonl", "model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        a, b = (_SPEED.sub(b"", next((folder / run).rglob(name)).read_bytes()) for run in "ab")
        yield {"name": name} | ({"equal_bytes": len(a)} if a == b else {"failed": "the runs differ"})


def _train(setup: Setup, run: Path, config: str, *more: str) -> list[dict[str, Any]]:
    """Train on built-in text by the command line, and return the metrics of the steps."""
    words = [*_TABLE["text"], *setup.sizes[config], f"data.cache_dir={run.parent / 'cache'}", *more]
    done = _call(["moe_gpt", "train", config, "--run-dir", run, "--device", setup.device, *words])
    if done.returncode:
        raise InputError(f"moe-gpt train {config}: " + done.stdout.strip().rpartition("\n")[2])
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_bytes().splitlines()) if "loss" in line]


def train_small(setup: Setup, folder: Path) -> Iterator[Result]:
    """Train ``small.yaml`` on built-in text, and yield losses and speed."""
    steps = _train(setup, folder / "run", "small.yaml")
    first, last, speed = steps[0]["ce_loss"], steps[-1]["ce_loss"], steps[-1]["tokens_per_second"]
    failed = {} if last < first else {"failed": "the loss did not fall"}
    yield {"name": f"{len(steps)} steps", "first": first, "last": last, "tokens_per_second": speed, **failed}


def measure_attention(setup: Setup, folder: Path) -> Iterator[Result]:
    """Yield the time and memory of attention within documents, and of causal attention, by length."""

    def show(name: str, turns: Turns) -> Result:
        return {"name": name, "seconds": min(turns.values), "peak_memory_bytes": turns.peak_memory_bytes}

    for length in setup.sizes["lengths"]:
        names = [f"{way}, {length} positions" for way in setup.sizes["ways"]]
        yield from _each(setup, names, functools.partial(make_attention, setup, length), show)


def make_attention(setup: Setup, length: int, name: str) -> Callable[[], float]:
    """Return what takes the seconds of shape L's attention: of the way that is named, forward or both ways."""
    model, device, has_gradients = setup.workload("L").model, setup.device, "both ways" in name
    B, dtype = max(setup.sizes["lengths"]) // length, _DTYPES[setup.precision]
    q, k, v = (
        torch.randn(B, heads, length, model.head_dim, device=device, dtype=dtype, requires_grad=has_gradients)
        for heads in (model.n_heads, model.n_kv_heads, model.n_kv_heads)
    )
    ids = (torch.rand(B, length, device=device) < 4 / length).long().cumsum(1)
    matrix = Visible(document_ids=ids).matrix(length, device) if "matrix" in name else None
    form = cuda.DocumentBlocks(ids) if "Flex" in name else matrix
    attend = functools.partial(cuda.attend, q, k, v, form)
    both_ways = lambda: torch.autograd.grad(attend().sum(), (q, k, v))  # noqa: E731
    return functools.partial(timed, device, both_ways if has_gradients else attend)


def decode(setup: Setup, folder: Path, shape: str) -> Iterator[Result]:
    """Yield the speed of greedy decoding, against transformers."""
    for batch_size in setup.sizes["batch_sizes"]:
        what = setup.workload(shape), batch_size, setup.sizes["new_tokens"]
        make, show = functools.partial(generate.make_decoder, *what), functools.partial(generate.result_of, *what)
        yield from _each(setup, generate.NAMES, make, show)


def serve(setup: Setup, folder: Path, shape: str) -> Iterator[Result]:
    """Yield the speed of the engine with as many requests at once as ``decode`` has sequences."""
    work, n_new = setup.workload(shape), setup.sizes["new_tokens"]
    model = MoEGPT(work.model).to(setup.device)
    for n_rows in setup.sizes["batch_sizes"]:
        engine = Engine(model, n_rows=n_rows, context=generate.PROMPT_TOKENS + n_new, precision=setup.precision)
        warm_up, measured = (timed(setup.device, functools.partial(_serve, engine, n_rows, n_new)) for _ in range(2))
        yield {"name": f"engine/{n_rows} rows", "tokens_per_second": n_rows * n_new / measured, "first": warm_up}


def _serve(engine: Engine, n_requests: int, n_new: int) -> None:
    """Answer requests with random prompts; raise what failed."""
    vocab_size = engine.model.embedding.num_embeddings
    for _ in range(n_requests):
        prompt = torch.randint(vocab_size, (generate.PROMPT_TOKENS,)).tolist()
        engine.add(Request(prompt=prompt, max_new_tokens=n_new, sampling=SamplingConfig(temperature=0)))
    for event in engine.run():
        if event.finish == "error":
            raise RuntimeError(event.error)


def profile(setup: Setup, folder: Path, shape: str) -> Iterator[Result]:
    """Yield the ten heaviest kernels of training steps; on a CPU, operations."""
    trained = Ours(setup.workload(shape))
    for _ in range(setup.sizes["warmup"]):
        trained.step()
    with torch.profiler.profile() as profiler:  # of all that this torch can profile
        for _ in range(setup.sizes["turns"]):
            trained.step()
    yield from heaviest(profiler.key_averages(), *setup.sizes["kernels"])


def heaviest(events: Iterable[Any], kind: str, time: str) -> Iterator[Result]:
    """Yield name, share of all time, calls and seconds of the ten events of a kind of device that take most."""
    microseconds = operator.attrgetter(time)
    mine = [event for event in events if (event.device_type.name, event.is_user_annotation) == (kind, False)]
    for event in sorted(mine, key=microseconds, reverse=True)[:10]:
        spent, total = microseconds(event), sum(map(microseconds, mine))
        yield {"name": event.key[:60], "share": spent / total, "calls": event.count, "seconds": spent / 1e6}
