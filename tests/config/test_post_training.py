"""The sections of stages after pre-training."""

from __future__ import annotations

import pytest

from moe_gpt.config import RunConfig
from moe_gpt.config.yaml import parse_yaml, to_plain, to_yaml
from moe_gpt.errors import ConfigError

SFT = {"row_tokens": 128, "sources": [{"name": "a", "builtin": "functions"}, {"name": "b", "files": "x.jsonl"}]}
STAGES = {"stages": [{"until_tokens": 512, "seq_len": 128, "batch_tokens": 256}]}


def test_a_run_is_pre_training_unless_it_has_a_section():
    """Null and a section without keys leave it out."""
    for values in ({}, {"sft": None}, parse_yaml("sft:", "a.yaml")):
        config = RunConfig.from_mapping(values)
        assert (config.sft, config.stage) == (None, None)
    assert RunConfig.from_mapping({"sft": SFT, "schedule": STAGES}).stage == "sft"


def test_a_section_survives_yaml():
    """Given or not."""
    for values in ({}, {"sft": SFT, "schedule": STAGES}):
        config = RunConfig.from_mapping(values)
        assert RunConfig.from_mapping(parse_yaml(to_yaml(config), "a.yaml")) == config
        assert RunConfig.from_mapping(to_plain(config)) == config


def test_the_context_is_that_of_the_weights_not_of_the_default():
    """A stage may have longer rows than a new model's default context."""
    stages = {"stages": [{"until_tokens": 1024, "seq_len": 512, "batch_tokens": 512}]}
    assert RunConfig.from_mapping({"sft": {**SFT, "row_tokens": 512}, "schedule": stages}).sft.row_tokens == 512


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"sft": {}}, "sft.sources is required"),
        ({"sft": 3}, "sft must be a section of settings"),
        ({"sft": {**SFT, "rows": 3}}, "sft.rows is not a known key; did you mean row_tokens?"),
        ({"sft": {"sources": [{"name": "a"}]}}, "sft.sources.0.builtin, files or dataset: give exactly one"),
        ({"sft": SFT}, "schedule.stages.0.seq_len must be sft.row_tokens=128, got 256"),
        ({"sft": {**SFT, "on_too_long": "cut"}}, "sft.on_too_long must be one of error, drop"),
        (
            {"adapters": {}},
            "adapters: they are for the stages of moe-gpt finetune; give a section sft, reward, dpo, rl",
        ),
        (
            {"sft": SFT, "schedule": STAGES, "adapters": {}, "train": {"train_only": ["a"]}},
            "adapters and train.train_only exclude each other; use adapters.also_train",
        ),
        ({"adapters": {"rank": 0}}, "adapters.rank must be"),
        ({"adapters": {"targets": []}}, "adapters.targets must name at least one matrix"),
        ({"adapters": {"also_train": ["("]}}, "adapters.also_train.0 must be a regular expression, got '('"),
        ({"train": {"train_only": ["a", "("]}}, "train.train_only.1 must be a regular expression, got '('"),
    ],
)
def test_a_bad_section_is_an_error_with_its_key(values, text):
    """Each with what would be right."""
    with pytest.raises(ConfigError) as error:
        RunConfig.from_mapping(values)
    assert text in str(error.value)
