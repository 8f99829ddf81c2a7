"""A small real corpus and the smallest run that has every part: two sources, three stages, accumulation."""

from __future__ import annotations

import os
import signal
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background, whose children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core already
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import yaml

from moe_gpt.config import RunConfig
from moe_gpt.data.builtin_corpus import iterate_builtin


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """Twelve pages of the language reference and six short files of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, document in zip(range(12), iterate_builtin("prose"), strict=False):
        (folder / f"prose_{number:02d}.txt").write_text(document.text[:6000], encoding="utf-8")
    for number, document in zip(range(6), iterate_builtin("code"), strict=False):
        (folder / f"code_{number:02d}.txt").write_text(document.text[:6000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_values(corpus_dir, tmp_path_factory) -> dict:
    """Plain values of a run of 24 steps and 6144 tokens that takes about a second."""
    return {
        "model": {"n_layers": 2, "d_model": 32, "n_heads": 2, "head_dim": 16, "d_ff": 32, "n_experts": 4}
        | {"max_seq_len": 64},
        "data": {
            "tokenizer": {"vocab_size": 400},
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
            "validation_fraction": 0.2,
            "validation_tokens": 512,
            "sources": [
                {"name": "prose", "files": str(corpus_dir / "prose_*.txt"), "epochs": 1},
                {"name": "code", "files": str(corpus_dir / "code_*.txt"), "epochs": 2, "prompt": "def "},
            ],
        },
        "schedule": {
            "stages": [
                {"until_tokens": 1024, "seq_len": 16, "batch_tokens": 128},
                {"until_tokens": 3072, "seq_len": 32, "batch_tokens": [128, 384]},
                {"until_tokens": 6144, "seq_len": 64, "batch_tokens": 384},
            ],
            "warmup_tokens": 512,
        },
        "optimizer": {"lr": 3e-3},
        "train": {
            "precision": "fp32",
            "micro_batch_tokens": 192,
            "log_every_steps": 3,
            "record_every_steps": 5,
            "sample_tokens": 4,
            "report": False,
        },
        "checkpoint": {"every_steps": 0},
    }


@pytest.fixture
def small_config(small_values) -> RunConfig:
    """The run of ``small_values``."""
    return RunConfig.from_mapping(small_values)


@pytest.fixture
def small_yaml(small_values, tmp_path) -> Path:
    """The run of ``small_values`` as a file."""
    path = tmp_path / "small_run.yaml"
    path.write_text(yaml.safe_dump(small_values), encoding="utf-8")
    return path
