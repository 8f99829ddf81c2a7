"""Options of ``moe-gpt prepare`` for many machines."""

from __future__ import annotations

import importlib.util
import re

import cyclopts
import pytest

from moe_gpt.commands.prepare import EngineOptions, prepare
from moe_gpt.config import DataConfig
from moe_gpt.errors import InputError
from moe_gpt.scale.extra import require_packages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 4}, "--tasks needs --engine local, ray or slurm"),
        ({"engine_option": ("workers=4",)}, "--engine-option needs --engine"),
        ({"engine": "ray"}, "--engine ray needs --tasks"),
        ({"engine": "slurm"}, "--engine slurm needs --tasks"),
    ],
)
def test_options_that_do_not_fit(options, message):
    """Options for an engine need one, and engines of many machines need a number of tasks."""
    with pytest.raises(InputError, match=message):
        EngineOptions(**options).check()


def test_no_tasks():
    """The number of tasks is at least 1."""
    app = cyclopts.App(result_action="return_value")
    app.default(prepare)
    with pytest.raises(cyclopts.CycloptsError, match="must be a whole number from 1"):
        app(["tiny.yaml", "--engine", "local", "--tasks", "0"], exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    ("missing", "engine", "keys"),
    [
        ("datatrove", "local", {}),
        ("ray", "ray", {}),
        ("spacy", "local", {"filters": {"regex": {"regex_exp": "a"}, "gopher_quality": {}}}),
        ("spacy", "local", {"near_duplicates": {"remove": True}}),
    ],
)
def test_missing_packages_are_named(missing, engine, keys, monkeypatch):
    """Without the extra, one line says what to install; plain preparation needs none of its packages."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    text = re.escape(f"needs the package {missing}; run pip install 'moe_gpt[scale]'")
    with pytest.raises(InputError, match=text):
        require_packages(engine, DataConfig(**keys))
    require_packages("local", DataConfig()) if missing != "datatrove" else None


def test_command_says_what_to_install(monkeypatch):
    """The command itself checks, before it reads any text."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"--engine local needs the package datatrove; run pip install 'moe_gpt\[scale\]'"
    ):
        prepare("tiny.yaml", options=EngineOptions(engine="local", tasks=2))
