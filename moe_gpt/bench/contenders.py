"""Whole training steps of moe_gpt and of what users would otherwise take, built from one shape."""

from __future__ import annotations

import abc
import dataclasses
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_gpt.bench.rounds import timed
from moe_gpt.config import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)
from moe_gpt.errors import InputError
from moe_gpt.measure.parameters import model_of
from moe_gpt.ops.device import Precision, autocast, tune_process

if TYPE_CHECKING:
    from moe_gpt.model.transformer import MoEGPT


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every contender does: the same model shape, batch and precision."""

    model: ModelConfig
    n_sequences: int
    seq_len: int
    device: str
    precision: Precision
    micro_batch_tokens: int
    compile: bool = False
    activation_checkpointing: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of moe_gpt's own steps."""
    tune_peers: bool = False
    """Give the peers our process settings, too, such as the allocator's; otherwise they run as they ship."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.n_sequences * self.seq_len


_COMMON = ModelConfig(n_heads=8, n_kv_heads=1, n_experts=16, top_k=2)
SHAPES = {
    name: (dataclasses.replace(_COMMON, max_seq_len=seq_len, **sizes), n_sequences, seq_len)  # type: ignore[arg-type]
    for name, n_sequences, seq_len, sizes in (
        ("S", 16, 256, {"vocab_size": 4096, "d_model": 256, "n_layers": 6, "head_dim": 32, "d_ff": 512}),
        ("M", 8, 512, {"vocab_size": 8192, "d_model": 512, "n_layers": 8, "head_dim": 64, "d_ff": 1024}),
        ("L", 32, 2048, {"vocab_size": 32_768, "d_model": 1024, "n_layers": 16, "head_dim": 128, "d_ff": 2816}),
    )
}


_ALONE = ParallelConfig()
CONTENDERS = ("moe_gpt", "dense", "transformers/eager", "transformers/grouped_mm", "transformers/mistral")


def workload_of(config: RunConfig, device: torch.device, precision: Precision) -> Workload:
    """Return the model, the largest batch and the precision of a config's last stage, in one micro-batch."""
    stage = config.schedule.stages[-1]
    n_sequences = stage.batch_range[1] // stage.seq_len
    return Workload(model_of(config), n_sequences, stage.seq_len, str(device), precision, n_sequences * stage.seq_len)


def dense_twin(model: ModelConfig) -> ModelConfig:
    """Return the dense model of the same active parameters but the router's: one expert as wide as ``top_k``."""
    return dataclasses.replace(model, n_experts=1, top_k=1, d_ff=model.d_ff * model.top_k)


class StepTimes(NamedTuple):
    """Seconds of one training step."""

    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Both."""
        return self.gradients + self.optimizer


class Contender(abc.ABC):
    """Something that trains: built once, then stepped on fresh random batches."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.device = workload, torch.device(workload.device)
        self._generator = torch.Generator().manual_seed(0)

    def step(self) -> StepTimes:
        """Take one optimizer step."""
        work = self.workload
        tokens = torch.randint(
            work.model.vocab_size or 1, (work.n_sequences, work.seq_len + 1), generator=self._generator
        ).to(self.device)
        gradients = timed(self.device, lambda: self.compute_gradients(tokens))
        return StepTimes(gradients, timed(self.device, self.update))

    @abc.abstractmethod
    def compute_gradients(self, tokens: Tensor) -> None:
        """Go forward and backward through tokens (B, T + 1)."""

    @abc.abstractmethod
    def update(self) -> None:
        """Clip gradients and step the optimizer."""


class Ours(Contender):
    """moe_gpt, by the functions that training calls; the dense twin where the model is dense.

    Where torchrun's variables are set, this is one of their ranks, and trains its part of the batch.
    """

    def __init__(self, workload: Workload, is_dense: bool = False, parallel: ParallelConfig = _ALONE) -> None:
        from moe_gpt.distributed.process import join
        from moe_gpt.training.setup import build_state

        super().__init__(workload)
        tune_process(self.device)
        model = dense_twin(workload.model) if is_dense else workload.model
        train = TrainConfig(
            precision=workload.precision,
            micro_batch_tokens=workload.micro_batch_tokens,
            compile=workload.compile,
            activation_checkpointing=workload.activation_checkpointing,
        )
        stage = StageConfig(
            seq_len=workload.seq_len, batch_tokens=workload.batch_tokens, until_tokens=workload.batch_tokens * 10**6
        )
        schedule = ScheduleConfig(stages=(stage,), warmup_tokens=0)
        self._config = config = RunConfig(
            model=model, schedule=schedule, train=train, parallel=parallel, optimizer=workload.optimizer
        )
        self._team = join(config)
        self._state = build_state(config, self.device, adapt=self._parallelized)
        self._state.model.train()

    def _parallelized(self, model: MoEGPT) -> MoEGPT:
        from moe_gpt.distributed.parallelize import parallelize

        parallelize(model, self._config, self._team.layout)
        return model

    def compute_gradients(self, tokens: Tensor) -> None:
        """Go forward and backward as ``train_step`` does."""
        from moe_gpt.data.batches import deal_batch, part_of
        from moe_gpt.data.stream import Batch
        from moe_gpt.training.step import accumulate_gradients

        work, team = self.workload, self._team
        batch = Batch(tokens[:, :-1].numpy(force=True), tokens[:, 1:].numpy(force=True))
        rows = max(1, work.micro_batch_tokens // work.seq_len)
        read = partial(part_of, batch)
        dealt = deal_batch(len(tokens), rows, read, self.device, None, team.data_rank, team.layout.data)
        model, loss = self._state.model, self._config.loss
        self._loss = accumulate_gradients(model, list(dealt), loss, work.precision, team)[0].loss

    def update(self) -> None:
        """Clip and step as ``train_step`` does."""
        from moe_gpt.training.step import update_weights

        settings = self._config.optimizer
        state = self._state
        update_weights(state.model, state.optimizer, settings.lr, settings.max_grad_norm, self._loss, self._team)


_SET_BY_TRANSFORMERS = {"architectures", "model_type", "experts_implementation"}


class Transformers(Contender):
    """Mixtral with one of its expert implementations, or Mistral with the same active parameters."""

    def __init__(self, workload: Workload, experts: str | None) -> None:
        import transformers

        from moe_gpt.interop.mixtral_layout import to_hugging_face

        super().__init__(workload)
        transformers.utils.logging.set_verbosity_error()
        torch.manual_seed(0)
        if workload.tune_peers:
            tune_process(self.device)
        shape = dense_twin(workload.model) if experts is None else workload.model
        values = to_hugging_face(shape, 0.0) | {"sliding_window": None, "use_cache": False}
        values = {key: value for key, value in values.items() if key not in _SET_BY_TRANSFORMERS}
        if experts is None:
            model: Any = transformers.MistralForCausalLM(transformers.MistralConfig(**values))
        else:
            values |= {
                "output_router_logits": True,
                "router_aux_loss_coef": LossConfig().load_balancing_loss_weight,
            }
            config = transformers.MixtralConfig(**values)
            model = transformers.MixtralForCausalLM._from_config(config, **experts_setting(experts))
        if workload.activation_checkpointing:
            model.gradient_checkpointing_enable()
        self._model = model.to(self.device).train()
        self._run = torch.compile(self._model) if workload.compile else self._model
        settings = OptimizerConfig()
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )

    def compute_gradients(self, tokens: Tensor) -> None:
        """Go forward and backward in micro-batches of the same size as ours."""
        work = self.workload
        parts = tokens.split(max(1, work.micro_batch_tokens // work.seq_len))
        for part in parts:
            with autocast(self.device, work.precision):
                output = self._run(input_ids=part[:, :-1])
                loss = F.cross_entropy(output.logits.float().flatten(0, 1), part[:, 1:].flatten())
            if getattr(output, "aux_loss", None) is not None:
                loss = loss + self._model.config.router_aux_loss_coef * output.aux_loss
            (loss * len(part) / len(tokens)).backward()

    def update(self) -> None:
        """Clip and step, with the fused optimizer that ours has."""
        nn.utils.clip_grad_norm_(self._model.parameters(), OptimizerConfig().max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def experts_setting(experts: str) -> dict[str, str]:
    """Return the argument that chooses transformers' implementation of experts.

    Raises:
        InputError: with transformers 4, which has the eager one only, for another.
    """
    version = metadata.version("transformers")
    if int(version.partition(".")[0]) >= 5:
        return {"experts_implementation": experts}
    if experts != "eager":
        raise InputError(f"the experts of transformers/{experts} need transformers 5, got {version}")
    return {}


def build(name: str, workload: Workload) -> Contender:
    """Return the contender of that name.

    Raises:
        InputError: where there is none, or a package that it needs is missing.
    """
    family, _, variant = name.partition("/")
    with torch.device(workload.device):  # a CPU takes half a minute to draw billions of initial weights
        match family:
            case "moe_gpt" | "dense":
                return Ours(workload, is_dense=family == "dense")
            case "transformers" if variant:
                try:
                    return Transformers(workload, None if variant == "mistral" else variant)
                except ImportError as error:
                    raise InputError(f"{name} needs a package: {error}; run: pip install transformers") from None
    raise InputError(f"there is no contender {name!r}; choose one of {', '.join(CONTENDERS)}")
