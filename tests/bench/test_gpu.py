"""The questions to a GPU, asked of a CPU with small sizes; what only a GPU has is made up."""

from __future__ import annotations

import inspect
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from run_scripts import command

from moe_gpt.bench import generate, gpu, stages
from moe_gpt.bench.contenders import build
from moe_gpt.bench.train import model_of
from moe_gpt.config.yaml import load_run_config
from moe_gpt.errors import InputError
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.plan.hardware import GPUS

CPU = gpu.Setup(torch.device("cpu"), "fp32", gpu._TABLE["other"])
CUDA = gpu.Setup(torch.device("cuda"), "bf16", gpu._TABLE["cuda"])
NAMES = ["moe_gpt", "dense", "transformers/eager"]


def done(status: int, text: str) -> subprocess.CompletedProcess:
    """Return what a command has left."""
    return subprocess.CompletedProcess([], status, text)


def test_every_stage_can_be_called_and_all_fit_into_ten_minutes():
    """Each names a function and its arguments, and two seconds of each minute stay for start and end."""
    for work, arguments, _ in gpu._TABLE["stages"].values():
        inspect.signature(getattr(gpu, work)).bind(CPU, folder=None, **arguments)
    assert sum(seconds for _, _, seconds in gpu._TABLE["stages"].values()) <= 580
    assert [*gpu._TABLE["stages"]][-1] == "train L, compiled"
    assert gpu._TABLE["other"].keys() - gpu._TABLE["cuda"].keys() == {"batch"}


@pytest.mark.parametrize("shape", [pytest.param("S", marks=pytest.mark.slow), "M", "L"])
def test_shapes_for_a_gpu_can_be_built(shape):
    """On the meta device, where they take no memory; micro-batches are whole sequences and divide the batch."""
    work = gpu.Setup(torch.device("meta"), "bf16", gpu._TABLE["cuda"]).workload(shape)
    assert work.batch_tokens % work.micro_batch_tokens == 0
    assert work.micro_batch_tokens % work.seq_len == 0
    for name in ("moe_gpt", "dense"):
        parameters = [*build(name, work)._state.model.parameters()]
        assert all(parameter.is_meta for parameter in parameters)
        assert sum(parameter.numel() for parameter in parameters) == count_parameters(model_of(work, name)).total


@pytest.mark.slow
def test_training_is_measured_and_who_does_not_run_has_a_reason(tmp_path):
    """The stage goes on; only where one of ours does not run, its result says that the stage failed."""
    names = ["moe_gpt", "transformers/none", "nanoGPT", "dense"]
    ours, peer, unknown, dense = gpu.train_shape(CPU, tmp_path, "S", False, names)
    assert [result["name"] for result in (ours, dense)] == ["moe_gpt", "dense"]
    for result in (ours, dense):
        assert result["tokens_per_second"] > 0
        assert result["of"] == "product measured here"
        assert 0 < result["mfu"] < 1
    assert peer.keys() == {"name", "not_run"}
    assert unknown["failed"].startswith("InputError: there is no contender 'nanoGPT'")


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_training_is_measured(tmp_path):
    """Ours, the twin and a peer, one after another in one process."""
    results = [*gpu.train_shape(CPU, tmp_path, "M", True, [*NAMES[:2], "transformers/mistral"])]
    assert [sorted(result.keys() & {"failed", "not_run", "mfu"}) for result in results] == [["mfu"]] * 3


@pytest.mark.slow
def test_memory_is_compared_with_the_plan(tmp_path, monkeypatch):
    """Twice as much memory in one case as in the other is twice the ratio; the plan of the twin is smaller."""
    ratios = []
    for allocated in (10**6, 2 * 10**6):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda allocated=allocated: allocated)
        results = [*gpu.train_shape(CPU, tmp_path, "S", False, NAMES[:2])]
        ratios.append([result["memory_over_plan"] for result in results])
    assert ratios[1] == [2 * ratio for ratio in ratios[0]]
    assert 0 < ratios[0][0] < ratios[0][1]
    n_parameters = count_parameters(CPU.workload("S").model).total
    assert 1e6 / ratios[0][0] > 16 * n_parameters  # weights, gradients, two moments


def test_peak_is_the_datasheet_of_a_gpu_that_the_plan_knows(monkeypatch):
    """Others are measured."""
    monkeypatch.setattr(gpu, "describe_device", lambda device: "cuda (NVIDIA H200)")
    assert gpu.peak_flops(CUDA) == (GPUS["h200"].bf16_flops, "datasheet of h200")
    monkeypatch.setattr(gpu, "describe_device", lambda device: "cuda (NVIDIA L4)")
    monkeypatch.setattr(gpu.train, "gemm_speed", lambda device, precision, size: (device.type, precision, size))
    assert gpu.peak_flops(CUDA) == (("cuda", "bf16", 8192), "product measured here")


TESTS = """
import pytest

@pytest.mark.gpu
def test_good(): pass

@pytest.mark.gpu
def test_bad(): assert {verdict}

def test_of_a_cpu(): assert False
"""


@pytest.mark.parametrize("verdict", [pytest.param(True, marks=pytest.mark.slow), False])
def test_gpu_tests_are_run_and_failures_named(tmp_path, monkeypatch, verdict):
    """Only those marked gpu, in files that have some: another file is not even read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "test_a.py").write_text(TESTS.format(verdict=verdict))
    (tmp_path / "test_b.py").write_text("import no_such_package")
    [result] = gpu.run_gpu_tests(CPU, tmp_path, tmp_path)
    assert ("2 passed" if verdict else "1 failed, 1 passed") in result["name"]
    assert "1 deselected" in result["name"]
    assert ("failed" in result) != verdict
    assert verdict or "test_a.py::test_bad" in result["failed"]


@pytest.mark.parametrize("has_cuda", [False, True])
def test_gpu_tests_are_skipped_without_a_gpu_or_tests(tmp_path, monkeypatch, has_cuda):
    """The reason is a row."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    folder = tmp_path / "none" if has_cuda else tmp_path
    assert [*gpu.run_gpu_tests(CPU, tmp_path, folder)] == [{"name": "pytest", "skipped": f"needs CUDA and {folder}"}]


@pytest.mark.parametrize("setup", [CPU, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("config", ["tiny.yaml", "small.yaml"])
def test_words_of_a_run_are_a_command_line_that_can_be_read(tmp_path, monkeypatch, setup, config):
    """With settings that the config has; an error of the run is the stage's reason."""
    words: list[str] = []
    monkeypatch.setattr(
        gpu, "_call", lambda given: words.extend(map(str, given)) or done(2, "x\nerror: no such thing\n")
    )
    with pytest.raises(InputError, match=f"moe-gpt train {config}: error: no such thing"):
        gpu._train(setup, tmp_path / "run", config, "train.deterministic=true")
    assert words[:3] == ["moe_gpt", "train", config]
    settings = [word for word in words[3:] if "=" in word and not word.startswith("--")]
    read = load_run_config(config, settings)
    assert {source.builtin for source in read.data.sources} == {"prose", "code"}
    assert read.data.cache_dir == str(tmp_path / "cache")
    assert read.train.deterministic


@pytest.mark.parametrize("differing", [None, "metrics.jsonl", "model.safetensors"])
def test_two_runs_are_compared_byte_by_byte(tmp_path, monkeypatch, differing):
    """All but the speed must be equal; a difference is the stage's failure."""

    def write_run(setup, run, config, *more):
        folder = run / "checkpoints" / "step_00000003"
        folder.mkdir(parents=True)
        for name in ("model", "optimizer", "rng"):
            is_other = run.name == "b" and differing == f"{name}.safetensors"
            (folder / f"{name}.safetensors").write_bytes(b"other" if is_other else b"equal")
        loss = 2.0 if run.name == "b" and differing == "metrics.jsonl" else 1.0
        line = {"loss": loss, "tokens_per_second": len(str(run)) + ord(run.name)}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(gpu, "_train", write_run)
    results = {result["name"]: result for result in gpu.repeat_a_run(CPU, tmp_path)}
    assert results.keys() == {"metrics.jsonl", "model.safetensors", "optimizer.safetensors", "rng.safetensors"}
    assert [name for name, result in results.items() if "failed" in result] == [differing] * bool(differing)


@pytest.mark.parametrize("last", [6.5, 7.0, float("nan")])
def test_small_must_learn(tmp_path, monkeypatch, last):
    """The loss falls, or the stage has failed."""
    steps = [{"ce_loss": loss, "tokens_per_second": 10.0} for loss in (7.0, last)]
    monkeypatch.setattr(gpu, "_train", lambda *_: steps)
    [result] = gpu.train_small(CPU, tmp_path)
    assert result["name"] == "2 steps"
    assert ("failed" in result) == (last != 6.5)


@pytest.mark.slow
def test_runs_train_on_a_cpu(tmp_path):
    """Both as the command line does it: two runs repeat their bytes, and small.yaml learns."""
    assert not [result for result in gpu.repeat_a_run(CPU, tmp_path) if "failed" in result]
    [result] = gpu.train_small(CPU, tmp_path)
    assert result["name"] == "6 steps"
    assert "failed" not in result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_is_measured_by_length(tmp_path):
    """Each way that a CPU has, at each length; no peer fails."""
    results = [*gpu.measure_attention(CPU, tmp_path)]
    assert [result["name"].rpartition(", ")[2] for result in results] == ["64 positions"] * 3 + ["128 positions"] * 3
    assert all(result["seconds"] > 0 for result in results)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_ways_of_attention_see_what_they_say(monkeypatch):
    """FlexAttention and the matrix see a document only, and give the same; causal attention sees more."""
    made = {}

    def keep(device, work):
        made[name] = work()
        return 1.0

    monkeypatch.setattr(gpu, "timed", keep)
    for name in ("FlexAttention forward", "SDPA with a matrix forward", "SDPA causal forward"):
        torch.manual_seed(0)
        gpu.make_attention(CPU, 64, name)()
    flex, matrix, causal = made.values()
    torch.testing.assert_close(flex, matrix)
    assert not torch.allclose(matrix, causal)
    name = "SDPA with a matrix both ways"
    gpu.make_attention(CPU, 64, name)()
    assert [gradient.shape[1] for gradient in made[name]] == [2, 1, 1]


@pytest.mark.slow
def test_decoding_is_measured_by_batch_size(tmp_path, monkeypatch):
    """With the cache of the shape."""
    monkeypatch.setattr(generate, "NAMES", ["moe_gpt"])
    results = [*gpu.decode(CPU, tmp_path, "M")]
    assert [(result["name"], result["batch_size"]) for result in results] == [
        ("generate/moe_gpt", 1),
        ("generate/moe_gpt", 2),
    ]
    assert all(result["tokens_per_second"] > 0 for result in results)


@pytest.mark.slow
def test_operations_of_a_cpu_are_profiled(tmp_path):
    """The heaviest first."""
    results = [*gpu.profile(CPU, tmp_path, "M")]
    assert len(results) == 10
    assert [result["share"] for result in results] == sorted((result["share"] for result in results), reverse=True)
    assert 0 < sum(result["share"] for result in results) <= 1


def test_kernels_of_a_gpu_are_counted_without_the_operations_that_start_them():
    """An operation's time on the device is that of its kernels, which would count twice; so would an annotation."""

    def event(key, kind, microseconds, is_user_annotation=False):
        kind = getattr(torch.autograd.DeviceType, kind)
        time = {"self_device_time_total": microseconds, "self_cpu_time_total": 1}
        return SimpleNamespace(key=key, count=2, device_type=kind, is_user_annotation=is_user_annotation, **time)

    events = [event("aten::mm", "CPU", 30), event("copy", "CUDA", 10), event("gemm", "CUDA", 30)]
    events.append(event("Optimizer.step#AdamW.step", "CUDA", 40, is_user_annotation=True))
    assert [*gpu.heaviest(events, *CUDA.sizes["kernels"])] == [
        {"name": "gemm", "share": 0.75, "calls": 2, "seconds": 30e-6},
        {"name": "copy", "share": 0.25, "calls": 2, "seconds": 10e-6},
    ]


class Here:
    """A worker in this process: starting Python and torch takes seconds."""

    def __init__(self, name, build):
        self.turn, self.failure = build(name), ""

    def ask(self, request, seconds):
        """Return what a call gave."""
        try:
            return [self.turn()]
        except Exception as error:
            self.failure = str(error)
            return []

    def close(self):
        """Leave nothing behind."""


@pytest.mark.parametrize("fails", [False, True])
def test_command_writes_one_file_and_one_table(tmp_path, monkeypatch, fails):
    """Status 1 and the number where stages failed; the file has machine, device and every result."""
    monkeypatch.setattr(stages, "Worker", Here)
    monkeypatch.setitem(gpu._TABLE, "stages", {
        "gpu tests": ["run_gpu_tests", {}, 5],
        "train S": ["train_shape", {"shape": "S", "compile": False, "names": ["nanoGPT" if fails else "dense"]}, 5],
    })  # fmt: skip
    path = tmp_path / "new" / "gpu.json"
    ended = command("bench", "gpu", "--device", "cpu", "--json", path)
    assert ended.returncode == fails
    assert ended.stdout.endswith("1 stages failed: train S\n" if fails else "no stage failed\n")
    assert "needs CUDA" in ended.stdout
    written = json.loads(path.read_text())
    assert written["device"].startswith("cpu")
    assert torch.__version__ in written["machine"]
    assert [row["status"] for row in written["stages"]] == ["skipped", "failed" if fails else "passed"]
    assert written["stages"][1]["results"][0]["name"] == ("nanoGPT" if fails else "dense")
    assert [*path.parent.iterdir()] == [path]
