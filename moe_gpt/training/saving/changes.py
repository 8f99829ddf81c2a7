"""Changes between a checkpoint and the run that resumes it, and which of them are allowed."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy
import tokenizers
import torch

import moe_gpt
from moe_gpt.config import RunConfig
from moe_gpt.config.flat import flatten
from moe_gpt.config.yaml import to_plain
from moe_gpt.errors import InputError, shown
from moe_gpt.training.saving.checkpoint import RunIdentity

_MAY_DIFFER = (
    "checkpoint.",
    "parallel.",
    "train.eval_every_steps",
    "train.log_every_steps",
    "train.record_every_steps",
    "train.record_tokens",
    "train.sample_tokens",
    "train.report",
    "tracking",
    "data.cache_dir",
    "data.verify_tokens",
    "faults.spike_",
    "faults.routing_window",
    "faults.dead_expert_load",
    "faults.collapsed_share",
)
_NOT_TOKENS = ("pictures", "encoder", "pairs", "prompts")  # of stages
_ROOMS_THAT_COMPUTE = ("config", "data", "distributed", "model", "ops", "post_training", "training")
_NEEDS_PERMISSION = ("moe_gpt", "torch", "code")
_SHAPE = ["vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "n_experts"]
_SHAPE += ["balance", "attention_sharing", "tie_embeddings"]
_FIXED = ("adapters.", "data.tokenizer.", "optimizer.name", "optimizer.state_type", *(f"model.{key}" for key in _SHAPE))
"""Settings that the saved weights, running means and tokens depend on. No permission can change them."""


class Change(NamedTuple):
    """Something that changed since the run was saved."""

    key: str
    """A setting, ``data.<source>``, or a key of the environment."""
    old: Any
    new: Any
    needs_permission: bool
    """True if the results may differ clearly; False if they only stop being bit-identical."""

    @property
    def is_impossible(self) -> bool:
        """Whether what was saved depends on the old value."""
        return self.key.startswith(_FIXED)

    def is_of(self, key: str) -> bool:
        """Whether ``key`` or something below it has changed."""
        return self.key == key or self.key.startswith(f"{key}.")

    def is_permitted(self, allowed: Collection[str]) -> bool:
        """Whether the run may continue with this change."""
        return not self.needs_permission or any(self.is_of(key) for key in allowed)

    @property
    def effect(self) -> str:
        """The consequence for a run that continues with this change."""
        if self.needs_permission:
            return ", as allowed; later results differ from those of the unchanged run"
        return "; the run continues in the same data order, but not bit-identically"

    def shown(self) -> str:
        """Return the key with its old and new value."""
        return f"{self.key} was {shown(self.old)} and is now {shown(self.new)}"


def describe_environment(device: torch.device, precision: str, n_processes: int = 1) -> dict[str, Any]:
    """Return everything besides config and data on which a bit-identical resume depends."""
    return {
        "moe_gpt": moe_gpt.__version__,
        "code": _code_digests(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": n_processes,
    }


def _code_digests() -> dict[str, str]:
    """Return a digest of each file of this package that can change what training computes."""
    root = Path(moe_gpt.__file__).parent
    files = sorted(file for room in _ROOMS_THAT_COMPUTE for file in (root / room).rglob("*.py"))
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def find_changes(saved_config: RunConfig, saved_state: dict[str, Any], identity: RunIdentity) -> list[Change]:
    """Compare a checkpoint's config and ``state.json`` with the process that resumes it."""
    return [
        *changed_settings(saved_config, identity.config),
        *_changed_data(saved_state["data_fingerprint"], identity.data_fingerprint),
        *_changed_environment(saved_state["environment"], identity.environment),
        *_changed_own_code("router", saved_state.get("router"), identity.router),
        *_changed_own_code("schedule", saved_state.get("schedule"), identity.schedule),
    ]


def settings_that_matter(config: RunConfig) -> dict[str, Any]:
    """Return the settings that can change the results of a run, by their dotted keys."""
    settings = flatten(to_plain(config))
    return {k: value for k, value in settings.items() if not k.startswith(_MAY_DIFFER) and not k.endswith(".prompt")}


def changed_settings(saved: RunConfig, wanted: RunConfig) -> Iterator[Change]:
    """Yield the settings that can change the results of a run and are not those that were saved."""
    old, new = settings_that_matter(saved), settings_that_matter(wanted)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield Change(key, old.get(key), new.get(key), needs_permission=True)


def _changed_data(saved: dict[str, str], found: dict[str, str]) -> Iterator[Change]:
    for name in saved.keys() & found.keys():  # a new or missing source is a changed setting
        if saved[name] != found[name]:
            kind = name if name in _NOT_TOKENS else "tokens"
            old, new = (f"{kind} with digest {digest[:12]}" for digest in (saved[name], found[name]))
            yield Change(f"data.{name}", old, new, needs_permission=True)


def _changed_environment(saved: dict[str, Any], found: dict[str, Any]) -> Iterator[Change]:
    for key in (key for key in found if saved.get(key, found[key]) != found[key]):
        old, new = saved[key], found[key]
        if isinstance(old, dict) and isinstance(new, dict):  # digests of the code
            files = sorted(file for file in old.keys() | new.keys() if old.get(file) != new.get(file))
            old, new = "another", f"changed in {', '.join(files)}"
        yield Change(key, old, new, needs_permission=key in _NEEDS_PERMISSION)


def _changed_own_code(key: str, saved: dict[str, str] | None, found: dict[str, str] | None) -> Iterator[Change]:
    if saved != found:
        old, new = (f"{code['name']} (source {code['digest']})" if code else "ours" for code in (saved, found))
        yield Change(key, old, new, needs_permission=True)


def check_changes(
    changes: Collection[Change], allowed: Collection[str], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Refuse changes that were not allowed, and return a record of the others.

    Args:
        allowed: keys given with --allow-changes. A key also allows everything below it: ``optimizer`` allows
            ``optimizer.lr``.
        say: shows every change that does not stop the run.

    Raises:
        InputError: with a line for each change that is not allowed, and the option that would allow them.
    """
    stopping = [change for change in changes if change.is_impossible or not change.is_permitted(allowed)]
    if stopping:
        _refuse(stopping, allowed)
    for note in _notes(changes, allowed):
        say(f"note: {note}")
    return [change._asdict() for change in changes]


def _notes(changes: Collection[Change], allowed: Collection[str]) -> Iterator[str]:
    for key in allowed:
        if not any(change.is_of(key) for change in changes):
            yield f"--allow-changes {key} had no effect: {key} is unchanged since the checkpoint"
    yield from (f"{change.shown()}{change.effect}" for change in changes)


def _refuse(stopping: Sequence[Change], allowed: Collection[str]) -> NoReturn:
    impossible = [change.key for change in stopping if change.is_impossible]
    # a list is allowed as a whole, because entries such as stages may come and go
    keys = dict.fromkeys([*allowed, *(re.sub(r"\.\d+(\..*)?$", "", change.key) for change in stopping)])
    remedy = f"undo the changes; or accept them with --allow-changes {','.join(keys)}"
    if impossible:
        remedy = f"undo the changes, because {impossible[0]} cannot change within a run"
    if any(change.key.startswith("schedule.stages") for change in stopping):
        remedy += "; or, if the run began with --fit-schedule, repeat --fit-schedule and its --max-steps"
    raise InputError(
        "--resume continues the same run, but there are changes since the checkpoint:\n"
        + "\n".join(change.shown() for change in sorted(stopping, key=lambda change: not change.is_impossible))
        + f"\n{remedy}; or start a new run with --init-from"
    )
