"""Parts of one's own in a run: routers, schedules and callbacks."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from run_scripts import script
from small_runs import CPU, Silent, change, run_training, steps

from moe_gpt.errors import InputError
from moe_gpt.interop import hugging_face
from moe_gpt.model.router import Router
from moe_gpt.training.callbacks import Callback, EarlyStopping, check_callbacks
from moe_gpt.training.evaluation import Score
from moe_gpt.training.loop import Limits, train
from moe_gpt.training.saving.checkpoint import read_state
from moe_gpt.training.saving.listing import list_checkpoints
from moe_gpt.training.saving.own_code import find_router
from moe_gpt.training.saving.run_folder import open_run_folder
from moe_gpt.training.saving.saved_model import load_model, resolve_checkpoint
from moe_gpt.training.schedule import Schedule, StepPlan, count_steps, fit_schedule
from moe_gpt.training.setup import OwnParts, set_up_run

SOURCE = '''
import torch
from moe_gpt import Router

class Scaled(Router):
    """Logits are scaled by a learned number."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.full((1,), 2.0))

    def logits(self, x):
        return self.scale * super().logits(x)
'''


class Scaled(Router):
    """Logits are scaled by a learned number."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.full((1,), 2.0))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return scaled logits."""
        return self.scale * super().logits(x)


@dataclasses.dataclass
class Constant:
    """The same step again and again."""

    plan: StepPlan = StepPlan(seq_len=32, batch_tokens=256, lr=1e-3)
    total_tokens: int = 1024

    def at(self, tokens_seen: int) -> StepPlan:
        """Return the plan."""
        return self.plan


@pytest.fixture(scope="module")
def own_run(small_values, tmp_path_factory):
    """A run of three steps with a router of its own, made by the command line; folder, config and router file."""
    import yaml

    folder = tmp_path_factory.mktemp("own")
    (folder / "small.yaml").write_text(yaml.safe_dump(small_values), encoding="utf-8")
    (folder / "scaled.py").write_text(SOURCE, encoding="utf-8")
    words = ["--config", folder / "small.yaml", "--run-dir", folder / "run", "--max-steps", 3]
    done = script("train.py", *words, "--router", f"{folder}/scaled.py:Scaled")
    assert done.returncode == 0, done.stderr
    commands = done.stdout.partition("next:")[2].strip().splitlines()  # a command without the router would be refused
    assert [command.rpartition("--router ")[2] for command in commands] == [f"{folder}/scaled.py:Scaled"] * 2
    return folder


def test_own_router_is_trained_and_recorded(own_run):
    """Its parameters are saved, with the optimizer's state, and its name and source digest stand in the checkpoint."""
    saved = load_model(own_run / "run", make_router=find_router(f"{own_run}/scaled.py:Scaled"))
    scales = [layer.router.scale.item() for layer in saved.model.moe_layers()]
    assert all(scale != 2.0 for scale in scales)
    router = read_state(saved.path)["router"]
    assert router["name"] == "Scaled"
    assert len(router["digest"]) == 16


def test_loading_without_the_router_says_which_it_was(own_run):
    """Neither a model nor a command takes the standard router in its place; the error names router and remedy."""
    for given in (None, Router):
        with pytest.raises(InputError, match=r"trained with the router Scaled.*--router.*make_router"):
            load_model(own_run / "run", make_router=given)
    for name, words in (("generate.py", ["--prompt", "a"]), ("evaluate.py", [])):
        refused = script(name, own_run / "run", *words)
        assert refused.returncode == 2
        assert "router Scaled" in refused.stderr
        done = script(name, own_run / "run", *words, "--router", f"{own_run}/scaled.py:Scaled")
        assert done.returncode == 0, done.stderr


def test_run_of_our_router_takes_no_other(own_run, small_config, tmp_path):
    """A model that was trained with the standard router is not loaded with another without a word."""
    run_training(small_config, tmp_path, max_steps=1)
    with pytest.raises(InputError, match="Router, got Scaled"):
        load_model(tmp_path, make_router=Scaled)


def test_another_source_of_the_router_is_told(own_run, tmp_path):
    """Loading with a changed router warns; resuming with it needs permission; the same one needs none."""
    (tmp_path / "scaled.py").write_text(SOURCE.replace("2.0", "3.0"), encoding="utf-8")
    with pytest.warns(UserWarning, match="source of the router Scaled"):
        load_model(own_run / "run", make_router=find_router(f"{tmp_path}/scaled.py:Scaled"))
    shutil.copytree(own_run / "run", tmp_path / "run")
    words = ["--config", own_run / "small.yaml", "--run-dir", tmp_path / "run", "--resume", "--max-steps", 4]
    refused = script("train.py", *words, "--router", f"{tmp_path}/scaled.py:Scaled")
    assert refused.returncode == 2
    assert "--allow-changes router" in refused.stderr
    assert script("train.py", *words, "--router", f"{own_run}/scaled.py:Scaled").returncode == 0


def test_only_our_own_router_is_exported(own_run, tmp_path):
    """As a Mixtral another router would compute something else: neither a checkpoint nor a model is written."""
    refused = script("export.py", own_run / "run", tmp_path / "hf")
    assert refused.returncode == 2
    assert "router Scaled" in refused.stderr
    model = load_model(own_run / "run", make_router=find_router(f"{own_run}/scaled.py:Scaled")).model
    with pytest.raises(InputError, match="router Scaled"):
        hugging_face.save(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("scaled", "FILE|a Python file"),
        ("nothing.py:Scaled", "no file nothing.py"),
        ("{folder}/scaled.py:Other", "Scaled"),
    ],
)
def test_router_that_is_not_there_is_named(own_run, place, wanted):
    """The error says what the form is, or what the file has."""
    with pytest.raises(InputError, match=wanted):
        find_router(place.format(folder=own_run))


def test_file_that_cannot_be_imported_is_named(tmp_path):
    """An error in the file is told with its type."""
    (tmp_path / "broken.py").write_text("raise KeyError('x')")
    with pytest.raises(InputError, match=r"broken\.py.*KeyError"):
        find_router(f"{tmp_path}/broken.py:Any")


def test_weights_of_another_router_start_a_run_with_new_routers(own_run, small_config, tmp_path):
    """--init-from copies everything but the routers, which keep their initial values."""
    run_training(small_config, tmp_path / "plain", max_steps=1)
    run = set_up_run(
        small_config, tmp_path / "new", CPU, init_from=str(tmp_path / "plain"), own=OwnParts(Scaled), say=lambda _: None
    )
    before = load_model(tmp_path / "plain").model
    assert torch.equal(run.state.model.embedding.weight, before.embedding.weight)
    assert run.state.model.moe_layers()[0].router.scale.item() == 2.0


def test_parameters_without_an_optimizer_are_an_error(small_config, tmp_path):
    """A router that is put in after the optimizer was built would never learn: training refuses to start."""
    run = set_up_run(small_config, tmp_path, CPU, say=lambda _: None)
    run.state.model.blocks[0].feed_forward.router = Scaled(run.config.model)
    with pytest.raises(InputError, match=r"blocks\.0\.feed_forward\.router\.weight"):
        train(run, Limits(max_steps=1), Silent())


def test_balance_by_bias_needs_a_router_that_has_one(small_config, tmp_path):
    """Said before data or steps, with what to use instead."""
    config = change(small_config, "model", balance="bias")
    with pytest.raises(InputError, match=r"balance=bias.*expert_bias"):
        set_up_run(config, tmp_path, CPU, own=OwnParts(lambda c: torch.nn.Linear(c.d_model, 4)), say=lambda _: None)


def test_router_that_cannot_route_is_told_before_a_folder_is_made(small_config, tmp_path):
    """A malformed routing, and a router in the place of what makes one."""
    with pytest.raises(ValueError, match="^a router must return"):
        set_up_run(
            small_config, tmp_path / "a", CPU, own=OwnParts(lambda c: torch.nn.Linear(32, 4)), say=lambda _: None
        )
    with pytest.raises(InputError, match="make_router must make"):
        set_up_run(small_config, tmp_path / "a", CPU, own=OwnParts(Scaled(small_config.model)), say=lambda _: None)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("given", [Constant, 3])
def test_schedule_that_is_no_object_with_at_is_told(small_config, tmp_path, given):
    """A class in the place of its object, and anything else."""
    with pytest.raises(InputError, match="a schedule must be an object"):
        set_up_run(small_config, tmp_path, CPU, own=OwnParts(schedule=given), say=lambda _: None)


@pytest.mark.parametrize("callbacks", [[Callback], Callback(), [3]])
def test_callbacks_that_are_none_are_told(callbacks):
    """A class, an object without a list, and something without methods."""
    with pytest.raises(InputError, match="callback"):
        check_callbacks(callbacks)


@pytest.mark.parametrize("options", [{"patience": 0}, {"patience": "three"}, {"min_improvement": -1}])
def test_early_stopping_checks_its_numbers(options):
    """The error names the number."""
    with pytest.raises(InputError, match=next(iter(options))):
        EarlyStopping(**options)


def own_schedule_run(config, folder, schedule, resume=False, **limits):
    run = set_up_run(config, folder, CPU, resume, own=OwnParts(schedule=schedule), say=lambda _: None)
    with open_run_folder(run.run_dir, run.identity, run.resumed_from, run.damaged):
        return run, train(run, Limits(**limits), Silent())


@pytest.mark.slow
def test_own_schedule_plans_every_step_and_the_end(small_config, tmp_path):
    """Every step is as planned, the run ends at its total, and a resumed run goes on to the same metrics."""
    run, outcome = own_schedule_run(small_config, tmp_path / "a", Constant())
    assert outcome == "finished"
    lines = steps(tmp_path / "a")
    assert [(line["seq_len"], line["batch_tokens"], line["lr"]) for line in lines] == [(32, 256, 1e-3)] * 4
    own_schedule_run(small_config, tmp_path / "b", Constant(), max_steps=2)
    own_schedule_run(small_config, tmp_path / "b", Constant(), resume=True)
    assert [line["loss"] for line in steps(tmp_path / "b")] == [line["loss"] for line in lines]


def test_own_schedule_is_recorded_and_missed(small_config, tmp_path):
    """Resuming with the config's schedule instead needs permission."""
    own_schedule_run(small_config, tmp_path, Constant(), max_steps=1)
    assert read_state(resolve_checkpoint(tmp_path))["schedule"]["name"] == "Constant"
    with pytest.raises(InputError, match=r"(?s)schedule was 'Constant.*--allow-changes schedule"):
        set_up_run(small_config, tmp_path, CPU, resume=True, say=lambda _: None)


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        ((32, 256), "StepPlan"),
        (StepPlan(0, 256, 1e-3), "seq_len"),
        (StepPlan(128, 256, 1e-3), "max_seq_len=64"),
        (StepPlan(48, 96, 1e-3), "must divide 64"),
        (StepPlan(32, 100, 1e-3), "multiple of seq_len=32"),
        (StepPlan(32, 0, 1e-3), "multiple of seq_len=32"),
        (StepPlan(32, 256, float("nan")), "lr"),
    ],
)
def test_plan_that_cannot_be_followed_is_named(small_config, tmp_path, plan, wanted):
    """The error names the schedule, its plan and what would be right."""
    with pytest.raises(InputError, match=rf"the schedule Constant gives .*{wanted}"):
        own_schedule_run(small_config, tmp_path, Constant(plan), max_steps=1)


@pytest.mark.parametrize("n_steps", [3, 5, 12, 24, 1000])
def test_fitted_schedule_ends_within_its_steps(small_config, n_steps):
    """It has at most as many steps as asked for, close to them, all stages, and the last learning rate of the whole."""
    schedule = Schedule(small_config.schedule, small_config.optimizer, 0)
    fitted = fit_schedule(small_config.schedule, small_config.optimizer, schedule, n_steps)
    short, whole = Schedule(fitted, small_config.optimizer, 0), count_steps(schedule)
    found = count_steps(short)
    assert 0.75 * min(n_steps, whole) <= found <= n_steps
    assert [stage.config.seq_len for stage in short.stages] == [16, 32, 64]
    assert short.lr_after(short.total_tokens) == small_config.optimizer.min_lr


def test_schedule_that_does_not_fit_is_refused(small_config):
    """Three stages need three steps."""
    schedule = Schedule(small_config.schedule, small_config.optimizer, 0)
    with pytest.raises(InputError, match=r"schedule\.stages.* 1 steps"):
        fit_schedule(small_config.schedule, small_config.optimizer, schedule, 1)


class Witness(Callback):
    """Remembers what it is told, and may ask to stop."""

    def __init__(self, stops_at: int | None = None) -> None:
        self.events: list[tuple] = []
        self.stops_at = stops_at

    def on_step(self, run, result):
        """Remember the step and its loss."""
        self.events.append(("step", run.state.step, float(result.metrics.loss)))
        return run.state.step == self.stops_at

    def on_evaluation(self, run, scores):
        """Remember which sources were scored."""
        self.events.append(("evaluation", run.state.step, tuple(scores)))

    def on_save(self, run, checkpoint):
        """Remember the checkpoint, which is on the disk."""
        assert (checkpoint / "manifest.json").is_file()
        self.events.append(("save", checkpoint.name))

    def on_end(self, run, outcome):
        """Remember why it ended."""
        self.events.append(("end", outcome))


def test_callbacks_are_told_in_order_and_change_nothing(small_config, tmp_path):
    """Evaluation, steps, saves, end; the metrics are those of a run without callbacks."""
    config = change(small_config, "checkpoint", every_steps=2)
    witness = Witness()
    run_training(config, tmp_path / "a", callbacks=[witness], max_steps=4)
    run_training(config, tmp_path / "b", max_steps=4)
    kinds = [event[0] for event in witness.events]
    assert kinds[0] == "evaluation"
    assert [event[1] for event in witness.events if event[0] == "step"] == [1, 2, 3, 4]
    assert {event[1] for event in witness.events if event[0] == "save"} == {"step_00000002", "step_00000004"}
    assert witness.events[-1] == ("end", "max_steps")
    losses = [[line["loss"] for line in steps(tmp_path / name)] for name in "ab"]
    assert losses[0] == losses[1] == [event[2] for event in witness.events if event[0] == "step"]


def test_callback_stops_the_run_which_is_saved(small_config, tmp_path):
    """The run ends after the step at which a callback returned True, with a checkpoint, and can be resumed."""
    run, outcome = run_training(small_config, tmp_path, callbacks=[Witness(stops_at=3)])
    assert (outcome, run.state.step) == ("callback", 3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000003"]
    assert run_training(small_config, tmp_path, resume=True)[1] == "finished"


def test_early_stopping_waits_for_its_patience():
    """It counts evaluations in a row that are not better than the best by the least improvement."""
    stop = EarlyStopping(patience=2, min_improvement=0.1)
    losses = [3.0, 2.0, 1.95, 1.5, 1.6, 1.45]
    answers = [stop.on_evaluation(None, {"prose": Score(loss, 1.0, 1)}) for loss in losses]
    assert answers == [False, False, False, False, False, True]


@pytest.mark.slow
def test_summary_of_a_shortened_run_speaks_of_the_learning_rate(own_run, tmp_path):
    """--max-steps below the schedule: the learning rate follows the whole; with --fit-schedule it ends at min_lr, 0."""
    words = ["--config", own_run / "small.yaml", "--max-steps", 5]
    done = script("train.py", *words, "--run-dir", tmp_path / "a")
    assert "--fit-schedule" in done.stdout
    done = script("train.py", *words, "--run-dir", tmp_path / "b", "--fit-schedule")
    assert done.returncode == 0, done.stderr
    assert "--fit-schedule" not in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "loss" in line][-1] == 0.0
    refused = script("train.py", *words[:2], "--run-dir", tmp_path / "c", "--fit-schedule")
    assert refused.returncode == 2
    assert "--max-steps" in refused.stderr


class AtEvaluation(Callback):
    """Asks to stop at the first evaluation after the start."""

    def on_evaluation(self, run, scores):
        """Return whether a step was done."""
        return run.state.step > 0


def test_stop_at_an_evaluation_comes_at_its_step(small_config, tmp_path):
    """No step follows the evaluation at which a callback returned True; that step is saved, with its score."""
    config = change(small_config, "train", eval_every_steps=2)
    run, outcome = run_training(config, tmp_path, callbacks=[AtEvaluation()])
    assert (outcome, run.state.step) == ("callback", 2)
    (checkpoint,) = list_checkpoints(tmp_path)
    assert (checkpoint.name, read_state(checkpoint)["score"] is None) == ("step_00000002", False)


class GrowsLater(Router):
    """Makes a parameter when it is first called in training."""

    def forward(self, x: torch.Tensor):
        """Route as usual."""
        if self.training and torch.is_grad_enabled() and not hasattr(self, "extra"):
            self.extra = torch.nn.Parameter(torch.zeros(1))
        return super().forward(x)


def test_parameters_that_are_made_later_are_an_error(small_config, tmp_path):
    """They would never learn, and the checkpoint could not be loaded: the first step ends the run with their names."""
    run = set_up_run(small_config, tmp_path, CPU, own=OwnParts(GrowsLater), say=lambda _: None)
    with (
        open_run_folder(run.run_dir, run.identity, run.resumed_from, run.damaged),
        pytest.raises(InputError, match=r"router\.extra"),
    ):
        train(run, Limits(max_steps=3), Silent())


def test_report_of_an_own_schedule_knows_its_end(small_config, tmp_path):
    """A run whose schedule is finished is reported as finished, wherever the config's stages end."""
    from moe_gpt.report.run_records import read_run

    own_schedule_run(small_config, tmp_path, Constant())
    found = read_run(tmp_path)
    assert (found.planned_tokens, found.is_short) == (1024, False)


def test_schedule_of_ones_own_is_not_fitted(small_yaml, tmp_path):
    """Only the stages of a config can be shrunk."""
    import moe_gpt

    with pytest.raises(InputError, match="fit_schedule"):
        moe_gpt.train(small_yaml, run_dir=tmp_path, schedule=Constant(), fit_schedule=True, max_steps=2)
