"""What differs between a run and its continuation, and whether it may."""

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
_ROOMS_THAT_COMPUTE = ("config", "data", "distributed", "model", "ops", "training")
_NEEDS_PERMISSION = ("moe_gpt", "torch", "code")
_SHAPE = ["vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "n_experts"]
_SHAPE += ["balance", "attention_sharing", "tie_embeddings"]
_FIXED = ("data.tokenizer.", *(f"model.{key}" for key in _SHAPE))
"""What the saved weights and tokens are made for; no permission makes another fit."""


class Change(NamedTuple):
    """Something that is not what it was when the run was saved."""

    key: str
    """A setting, ``data.<source>``, or a key of the environment."""
    old: Any
    new: Any
    needs_permission: bool
    """Whether the results would be another run's, rather than merely not the same to the bit."""

    def is_of(self, key: str) -> bool:
        """Whether it is the change of ``key`` or of something below it."""
        return self.key == key or self.key.startswith(f"{key}.")

    def is_permitted(self, allowed: Collection[str]) -> bool:
        """Whether the run may go on with it."""
        return not self.needs_permission or any(self.is_of(key) for key in allowed)

    @property
    def effect(self) -> str:
        """What it means for the run that goes on all the same."""
        if self.needs_permission:
            return ", as allowed; from here on this is another run than it would have been"
        return ": the run goes on in the same data order, but not bit-identically"

    def shown(self) -> str:
        """Return it in words."""
        return f"{self.key} was {shown(self.old)} and is now {shown(self.new)}"


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Return what bit-identical resume depends on besides config and data."""
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
        "processes": 1,
    }


def _code_digests() -> dict[str, str]:
    """Return a digest of each file of this package that training computes with."""
    root = Path(moe_gpt.__file__).parent
    files = sorted(file for room in _ROOMS_THAT_COMPUTE for file in (root / room).rglob("*.py"))
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def find_changes(saved_config: RunConfig, saved_state: dict[str, Any], identity: RunIdentity) -> list[Change]:
    """Compare a checkpoint with what it would be continued with.

    Args:
        saved_config: of the checkpoint.
        saved_state: its state.json.
        identity: of the process that wants to go on.
    """
    return [
        *_changed_settings(saved_config, identity.config),
        *_changed_data(saved_state["data_fingerprint"], identity.data_fingerprint),
        *_changed_environment(saved_state["environment"], identity.environment),
        *_changed_own_code("router", saved_state.get("router"), identity.router),
        *_changed_own_code("schedule", saved_state.get("schedule"), identity.schedule),
    ]


def _changed_settings(saved: RunConfig, wanted: RunConfig) -> Iterator[Change]:
    old, new = flatten(to_plain(saved)), flatten(to_plain(wanted))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(_MAY_DIFFER) and not key.endswith(".prompt"):
            yield Change(key, old.get(key), new.get(key), needs_permission=True)


def _changed_data(saved: dict[str, str], found: dict[str, str]) -> Iterator[Change]:
    for name in saved.keys() & found.keys():  # a source more or less is a changed setting
        if saved[name] != found[name]:
            old, new = (f"tokens with digest {digest[:12]}" for digest in (saved[name], found[name]))
            yield Change(f"data.{name}", old, new, needs_permission=True)


def _changed_environment(saved: dict[str, Any], found: dict[str, Any]) -> Iterator[Change]:
    for key in found:
        if key not in saved or saved[key] == found[key]:
            continue
        old, new = saved[key], found[key]
        if isinstance(old, dict) and isinstance(new, dict):  # digests of the code
            names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
            old, new = "another", f"changed in {', '.join(names)}"
        yield Change(key, old, new, needs_permission=key in _NEEDS_PERMISSION)


def _changed_own_code(key: str, saved: dict[str, str] | None, found: dict[str, str] | None) -> Iterator[Change]:
    if saved != found:
        old, new = (f"{code['name']} (source {code['digest']})" if code else "ours" for code in (saved, found))
        yield Change(key, old, new, needs_permission=True)


def check_changes(
    changes: Collection[Change], allowed: Collection[str], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Refuse changes that were not allowed, and return a record of those that were.

    Args:
        changes: from ``find_changes``.
        allowed: keys given with --allow-changes; a key also allows what is below it (``optimizer`` allows
            ``optimizer.lr``).
        say: told about every change that does not stop the run.

    Raises:
        InputError: with a line for each change that is not allowed, and what to add to allow them.
    """
    refused = [change for change in changes if not change.is_permitted(allowed)]
    impossible = [c for c in changes if c.key.startswith(_FIXED)]
    if impossible or refused:
        _refuse(impossible, refused, allowed)
    for key in _without_effect(allowed, changes):
        say(f"note: --allow-changes {key} had no effect: {key} is unchanged since the checkpoint")
    for change in changes:
        say(f"note: {change.shown()}{change.effect}")
    return [change._asdict() for change in changes]


def _without_effect(allowed: Collection[str], changes: Collection[Change]) -> list[str]:
    return [key for key in allowed if not any(change.is_of(key) for change in changes)]


def _refuse(impossible: Sequence[Change], refused: Sequence[Change], allowed: Collection[str]) -> NoReturn:
    # an entry of a list stands for the list: stages that come and go have no value of their own to allow
    keys = dict.fromkeys([*allowed, *(re.sub(r"\.\d+(\..*)?$", "", change.key) for change in refused)])
    remedy = f"go on all the same with --allow-changes {','.join(keys)}"
    if impossible:
        remedy = f"{impossible[0].key} cannot change within a run"
    raise InputError(
        "--resume continues the same run, but something has changed since the checkpoint:\n"
        + "\n".join(change.shown() for change in dict.fromkeys([*impossible, *refused]))
        + f"\nrestore it; or {remedy}; or start a new run with --init-from"
    )
