"""Trackers: the names of values, real event files, a service that fails, a package that is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from types import ModuleType

import pytest
from small_runs import run_training

from moe_gpt.errors import InputError
from moe_gpt.training.records.tracking import open_tracker, tracked_values


class FakeWandb(ModuleType):
    """Stands in for the package and for its run: remembers every call, and fails in the one it is told to."""

    def __init__(self, failing: str = "", error: BaseException | None = None) -> None:
        super().__init__("wandb")
        self.calls: list[tuple] = []
        self._failing, self._error = failing, error

    def _called(self, name: str, *values) -> FakeWandb:
        self.calls.append((name, *values))
        if name == self._failing and self._error:
            raise self._error
        return self

    def init(self, **settings) -> FakeWandb:
        """Begin a run."""
        return self._called("init", settings)

    def define_metric(self, name, step_metric) -> None:
        """Set the x axis."""
        self._called("define_metric", name, step_metric)

    def log(self, values) -> None:
        """Take a row."""
        self._called("log", values)

    def finish(self) -> None:
        """End the run."""
        self._called("finish")

    def Html(self, page) -> str:  # noqa: N802 (wandb's name)
        """Wrap a page."""
        return f"page {page}"

    def named(self, name: str) -> list[tuple]:
        """Return the calls of a name."""
        return [call for call in self.calls if call[0] == name]


@pytest.fixture
def use_wandb(monkeypatch):
    """Put a fake package in the place of wandb."""

    def use(failing: str = "", error: BaseException | None = None) -> FakeWandb:
        fake = FakeWandb(failing, error)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return use


def never(text: str) -> None:
    raise AssertionError(f"nothing should be said, got {text!r}")


def events(run_dir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()


def points(run_dir, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run_dir).Scalars(name)]


def texts(run_dir, name: str) -> list[tuple[int, str]]:
    tag = f"{name}/text_summary"  # as TensorBoard's text page has it
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events(run_dir).Tensors(tag)]


def use_everything(tracker) -> None:
    for step in (1, 2):
        tracker.log(step, {"train/loss": 0.5})
        tracker.text(step, "samples/prose", "once")
    tracker.close()


def test_values_of_an_optimizer_step_are_named_train():
    """Every number but the step is train/<key>, an unknown one too; a flag is 0 or 1."""
    line = {"step": 7, "tokens_seen": 896, "lr": 1e-3, "loss": 2.5, "skipped": True, "new": 3}
    expected = {"tokens_seen": 896, "lr": 1e-3, "loss": 2.5, "skipped": 1, "new": 3}
    values = tracked_values(line)
    assert values == {f"train/{key}": value for key, value in expected.items()}
    assert all(type(value) is float for value in values.values())


def test_values_of_an_evaluation_keep_their_names():
    """val/ names stay; texts are not values; tokens_seen is a value of the optimizer step's line only."""
    line = {"step": 7, "tokens_seen": 896, "val/code/ce_loss": 2.0, "val/code/bits_per_byte": 0.9}
    line |= {"val/facts/accuracy": 0.25, "val/facts/sample": "Paris", "seconds": 1.5}
    assert tracked_values(line) == {
        "val/code/ce_loss": 2.0,
        "val/code/bits_per_byte": 0.9,
        "val/facts/accuracy": 0.25,
        "train/seconds": 1.5,
    }


def test_values_of_a_recording_are_named_by_layer_expert_and_group():
    """Layers and experts have two digits; groups are below norms."""
    routing = {"load": [[0.25, 0.75], [0.5, 0.5]], "max_violation": [0.5, 0.0]}
    groups = {"attention": {"parameter_norm": 3.0, "update_norm": None}}
    assert tracked_values({"step": 7, "tokens_seen": 896, "routing": routing, "groups": groups}) == {
        "routing/layer_00/load/expert_00": 0.25,
        "routing/layer_00/load/expert_01": 0.75,
        "routing/layer_01/load/expert_00": 0.5,
        "routing/layer_01/load/expert_01": 0.5,
        "routing/layer_00/max_violation": 0.5,
        "routing/layer_01/max_violation": 0.0,
        "norms/attention/parameter_norm": 3.0,
    }


@pytest.mark.parametrize(("n", "last"), [(99, "98"), (100, "099"), (128, "127")])
def test_hundred_layers_or_experts_have_three_digits(n, last):
    """Sorting by name keeps the order of layers and experts, however many there are."""
    values = tracked_values({"step": 1, "routing": {"load": [[0.5] * n] * n}})
    assert list(values) == sorted(values)
    assert list(values)[-1] == f"routing/layer_{last}/load/expert_{last}"


@pytest.mark.parametrize("absent", [None, math.nan, math.inf, "text", [1.0], {"a": 1.0}])
def test_what_is_not_a_finite_number_is_left_out(absent):
    """None, not-a-number, texts and unknown structures are no values, wherever they stand."""
    line = {"step": 3, "loss": absent, "val/code/ce_loss": absent, "groups": {"router": {"norm": absent}}}
    assert tracked_values(line | {"lr": 1.0}) == {"train/lr": 1.0}
    assert tracked_values({"step": 3, "routing": {"load": [[None, 1.0], None], "token_entropy": None}}) == {
        "routing/layer_00/load/expert_01": 1.0
    }
    assert tracked_values({"step": 3, "routing": None, "groups": {"router": None}}) == {}


def test_none_writes_nothing(tmp_path):
    """Without tracking there is no file and no word."""
    use_everything(open_tracker("none", tmp_path, {}, never))
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_what_was_logged(tmp_path):
    """Each value is a point at x = step; texts are shown as they are; the settings are there once."""
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path, {"model": {"n_layers": 2}}, never)
    tracker.log(3, {"train/loss": 2.5, "train/lr": 0.25})
    tracker.log(4, {"train/loss": 1.5})
    tracker.text(4, "samples/prose", "# Once\nupon")
    tracker.close()
    assert points(tmp_path, "train/loss") == [(3, 2.5), (4, 1.5)]
    assert points(tmp_path, "train/lr") == [(3, 0.25)]
    assert texts(tmp_path, "samples/prose") == [(4, "    # Once\n    upon")]
    ((step, settings),) = texts(tmp_path, "settings")
    assert step == 0
    assert '"n_layers": 2' in settings


@pytest.mark.parametrize(("resumed_at", "kept"), [(2, [(1, 1.0), (2, 2.0)]), (None, [])])
def test_tensorboard_shows_one_curve_after_a_resume(tmp_path, monkeypatch, resumed_at, kept):
    """Points up to the step that is resumed from stay, later ones are replaced; a run from the start replaces all."""
    pytest.importorskip("tensorboard")
    # files of one second are read in the order of the host's name
    monkeypatch.setattr("socket.gethostname", lambda: "a")
    first = open_tracker("tensorboard", tmp_path, {}, never)
    for step in range(1, 6):
        first.log(step, {"train/loss": step})
    first.close()
    monkeypatch.setattr("socket.gethostname", lambda: "b")
    second = open_tracker("tensorboard", tmp_path, {}, never, resumed_at=resumed_at)
    second.log(3, {"train/loss": 30})
    second.close()
    assert points(tmp_path, "train/loss") == [*kept, (3, 30.0)]


def test_closed_tensorboard_stays_closed(tmp_path):
    """What is logged after close begins no other file, and closing again does nothing."""
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path, {}, never)
    use_everything(tracker)
    use_everything(tracker)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert points(tmp_path, "train/loss") == [(1, 0.5), (2, 0.5)]


def test_tensorboard_that_cannot_write_stops_nothing(tmp_path):
    """A file in the place of TensorBoard's folder is told once; the run goes on."""
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    said: list[str] = []
    use_everything(open_tracker("tensorboard", tmp_path, {}, said.append))
    (line,) = said
    assert line.startswith("tracking by tensorboard stopped: ")
    assert str(tmp_path / "tensorboard") in line


def test_wandb_gets_settings_values_and_texts(tmp_path, use_wandb):
    """The run is named by its folder; step is the x axis of everything; texts are escaped; close ends the run."""
    fake, settings = use_wandb(), {"model": {"n_layers": 2}}
    tracker = open_tracker("wandb", tmp_path, settings, never)
    tracker.log(3, {"train/loss": 2.5})
    tracker.log(4, {})
    tracker.text(4, "samples/prose", "a < b\nc")
    tracker.close()
    (_, started), *rest = fake.calls
    assert len(started.pop("id")) == 16
    assert started.pop("dir") == str(tmp_path)
    assert started == {"project": "moe_gpt", "name": tmp_path.name, "resume": "allow", "config": settings}
    page = 'page <pre style="white-space: pre-wrap">a &lt; b\nc</pre>'
    assert rest == [
        ("define_metric", "*", "step"),
        ("log", {"train/loss": 2.5, "step": 3}),
        ("log", {"samples/prose": page, "step": 4}),
        ("finish",),
    ]


def test_wandb_continues_the_run_of_the_same_folder(tmp_path, use_wandb, monkeypatch):
    """One folder is one run, however its path is written; another folder is another run."""
    fake = use_wandb()
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "link", type(tmp_path)("."), tmp_path):
        open_tracker("wandb", folder, {}, never).close()
    identities = [(call[1]["id"], call[1]["name"]) for call in fake.named("init")]
    assert identities[0] == identities[1] == identities[2]
    assert identities[3][0] != identities[0][0]
    assert identities[0][1] == "a"


@pytest.mark.parametrize("failing", ["init", "define_metric", "log", "finish"])
def test_failing_wandb_is_told_once_and_then_left_alone(tmp_path, use_wandb, failing):
    """Whatever a service raises, the run goes on, hears of it in one line, and does not try again."""
    fake = use_wandb(failing, OSError("no route to host.\nmore about it"))
    said: list[str] = []
    use_everything(open_tracker("wandb", tmp_path, {}, said.append))
    assert said == ["tracking by wandb stopped: no route to host; metrics.jsonl has all metrics"]
    assert len(fake.named(failing)) == 1
    assert fake.calls[-1][0] == failing


def test_failure_without_a_message_is_told_by_its_kind(tmp_path, use_wandb):
    """An error that has no text is named."""
    use_wandb("log", TimeoutError())
    said: list[str] = []
    use_everything(open_tracker("wandb", tmp_path, {}, said.append))
    assert said == ["tracking by wandb stopped: TimeoutError; metrics.jsonl has all metrics"]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_interrupt_is_not_swallowed(tmp_path, use_wandb, failing):
    """Control-C within the service ends the run as anywhere else."""
    use_wandb(failing, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        use_everything(open_tracker("wandb", tmp_path, {}, never))


@pytest.mark.parametrize(("name", "requirement"), [("tensorboard", "'moe_gpt[track]'"), ("wandb", "wandb")])
def test_missing_package_is_an_error_that_says_what_to_install(tmp_path, monkeypatch, name, requirement):
    """The error names the setting, its value and the command; nothing is written."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"^tracking={name} needs .* run pip install ") as caught:
        open_tracker(name, tmp_path, {}, never)
    assert f"pip install {requirement}, " in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_package_that_lacks_a_part_is_told_and_not_raised(tmp_path, monkeypatch):
    """Only a missing package is an error: one that is installed and broken is a service that failed."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import a_part_that_is_missing")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    said: list[str] = []
    use_everything(open_tracker("wandb", tmp_path, {}, said.append))
    (line,) = said
    assert "No module named 'a_part_that_is_missing'" in line


def test_missing_package_is_found_before_a_run_is_written(small_config, tmp_path):
    """Nothing is left behind that would be in the way of the same command without the tracker."""
    config = dataclasses.replace(small_config, tracking="wandb")
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    with pytest.raises(InputError, match="tracking=wandb needs the package wandb, which is not installed"):
        run_training(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
