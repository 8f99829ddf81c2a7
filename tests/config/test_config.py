"""Every setting is checked once, strictly, and everything that is wrong is said together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpt.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
)
from moe_gpt.config.section import annotations_of, expectation, is_list, section_in
from moe_gpt.config.yaml import CONFIGS, find_config, load_run_config, to_plain, to_yaml
from moe_gpt.errors import ConfigError
from moe_gpt.model.transformer import MoEGPT

law = settings(max_examples=50, deadline=None, derandomize=True)


@pytest.fixture
def load(tmp_path):
    """Return a function that loads YAML text with overrides."""

    def load_text(text: str, *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run_config(path, overrides)

    return load_text


@pytest.fixture
def problems(load):
    """Return a function that lists the problems of YAML text with overrides."""

    def problems_of(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return caught.value.problems

    return problems_of


def test_all_problems_of_a_file_are_reported_together(problems):
    """Unknown, ill-typed, missing and contradictory settings of all sections appear at once, each with its value."""
    found = problems(
        "model: {n_layer: 2, d_model: wide, head_dim: 33}\n"
        "data: {sources: [{builtin: novels, name: a}], validation_fraction: 2}\n"
        "optimizer: {lr: 1e-3, min_lr: 1}\n"
        "train: {seed: -1}\n"
    )
    expected = [
        ("model.n_layer ", "n_layers"),
        ("model.d_model ", "'wide'"),
        ("model.head_dim ", "33"),
        ("data.sources.0.builtin ", "'novels'"),
        ("data.validation_fraction ", "2"),
        ("optimizer.min_lr ", "1"),
        ("train.seed ", "-1"),
    ]
    assert len(found) == len(expected)
    assert all(any(line.startswith(key) and value in line for line in found) for key, value in expected)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("modle: {}", "modle is not a known key; did you mean model?"),
        ("model: {n_layer: 2}", "model.n_layer is not a known key; did you mean n_layers?"),
        ("data: {tokenizer: {vocab: 300}}", "data.tokenizer.vocab is not a known key; did you mean vocab_size?"),
        (
            "data: {sources: [{name: a, builtin: code}, {name: b, builtin: code, epoch: 2}]}",
            "data.sources.1.epoch is not a known key; did you mean epochs?",
        ),
        (
            "schedule: {stages: [{seq_len: 64, batch_token: 64, batch_tokens: 64}]}",
            "schedule.stages.0.batch_token is not a known key; did you mean batch_tokens?",
        ),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_one(problems, text, line):
    """An unknown key is an error that names the nearest valid key, at every depth."""
    assert problems(text) == [line]


@pytest.mark.parametrize("number", ["9" * 6000, "0x" + "f" * 6000])
def test_a_number_of_many_digits_is_named(problems, number):
    """Python spells none of them, and its advice is no help here."""
    (line,) = problems(f"train: {{seed: {number}}}")
    assert line.startswith(f"train.seed must be a whole number from 0 to 2^63 - 1, got '{number[:20]}")


def test_half_of_a_surrogate_pair_is_named(problems):
    """It is text, and UTF-8 cannot represent it; a file with one is no YAML."""
    with pytest.raises(ConfigError, match=r"prompt must be text without halves of surrogate pairs, got 'a\\ud800'"):
        SourceConfig(name="a", builtin="prose", prompt="a\ud800")
    (line,) = problems('data: {sources: [{name: a, builtin: prose, prompt: "a\\ud800"}]}')
    assert "invalid Unicode character escape code" in line


def test_empty_key_is_not_taken_for_its_section(problems):
    """An empty key inside a section is reported as such; the section itself is not called unknown."""
    assert not problems('model: {"": 3}')[0].startswith("model is not a known key")


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3", 3.0), ("0.5", 0.5), ("1_000", 1000.0)])
def test_number_is_read_however_it_is_written(load, text, value):
    """``1e-4``, which PyYAML reads as text, is a number, in the file and in an override."""
    assert load(f"optimizer: {{lr: {text}}}").optimizer.lr == value
    assert load("", f"optimizer.lr={text}").optimizer.lr == value


@pytest.mark.parametrize(("text", "value"), [("8e6", 8_000_000), ("8_000_000", 8_000_000), ("4.0", 4), ("'12'", 12)])
def test_count_is_read_however_it_is_written(load, text, value):
    """A whole number written with an exponent, underscores or quotes is that whole number."""
    d_ff = load(f"model: {{d_ff: {text}}}").model.d_ff
    assert d_ff == value
    assert type(d_ff) is int


@pytest.mark.parametrize(
    ("text", "shown"),
    [("true", "True"), ("4.5", "4.5"), ("0", "0"), ("-3", "-3"), ("many", "'many'"), ("[4]", "[4]"), (".inf", "inf")],
)
def test_count_refuses_what_is_not_a_whole_number(problems, text, shown):
    """A truth value, a fraction, zero or a word for a count is an error that shows the value."""
    assert problems(f"model: {{d_ff: {text}}}") == [
        f"model.d_ff must be a whole number from 1 to 2^63 - 1, got {shown}"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optimizer: {lr: .nan}", "optimizer.lr must be a number above 0, got nan"),
        ("optimizer: {lr: .inf}", "optimizer.lr must be a number above 0, got inf"),
        ("optimizer: {lr: true}", "optimizer.lr must be a number above 0, got True"),
        ("optimizer: {beta1: 1}", "optimizer.beta1 must be a number of at least 0 and below 1, got 1"),
        ("train: {compile: 1}", "train.compile must be true or false, got 1"),
        ("train: {compile: 'yes'}", "train.compile must be true or false, got 'yes'"),
        ("train: {precision: fp16}", "train.precision must be one of auto, bf16, fp32, got 'fp16'"),
        ("data: {cache_dir: 5}", "data.cache_dir must be text or null, got 5"),
        ("model: 5", "model must be a section of settings, got 5"),
        ("data: {sources: []}", "data.sources must be a list with at least one entry, got []"),
        ("data: {sources: [5]}", "data.sources.0 must be a section of settings, got 5"),
        ("data: {sources: [{builtin: code}]}", "data.sources.0.name is required: give letters, digits, - and _"),
    ],
)
def test_wrong_type_names_key_expectation_and_value(problems, text, line):
    """A value of the wrong type is one line: the key, what it must be, what it is."""
    assert problems(text) == [line]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("n_heads: 12, n_kv_heads: 5", ["model.n_heads", "n_heads=12", "n_kv_heads=5", "1, 2, 3, 4, 6, 12"]),
        ("head_dim: 33", ["model.head_dim", "33", "34"]),
        ("n_experts: 4, top_k: 5", ["model.top_k", "top_k=5", "n_experts=4"]),
        ("n_experts: 4, top_k: 1", ["model.normalize_topk", "top_k=1", "n_experts=4", "true"]),
        ("n_layers: 4, attention_sharing: 3", ["model.n_layers", "attention_sharing=3", "n_layers=4", "1, 2, 4"]),
        ("max_seq_len: 128", ["schedule.stages.0.seq_len", "model.max_seq_len=128", "256"]),
    ],
)
def test_impossible_model_is_refused(problems, text, parts):
    """Each impossible shape is exactly one problem with its keys, values and, where there are some, valid choices."""
    (line,) = problems(f"model: {{{text}}}")
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize("text", ["n_experts: 1, top_k: 1", "n_experts: 4, top_k: 1, normalize_topk: false"])
def test_single_expert_per_token_is_allowed_where_the_router_still_learns(load, text):
    """top_k 1 is fine in a dense model and without renormalised weights."""
    assert load(f"model: {{{text}}}").model.top_k == 1


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        ("{seq_len: 64, batch_tokens: 100}", ["stages.0.batch_tokens", "seq_len=64", "got 100", "use 128"]),
        ("{seq_len: 64, batch_tokens: [64, 100]}", ["stages.0.batch_tokens", "seq_len=64", "got 100", "use 128"]),
        ("{seq_len: 64, batch_tokens: [64]}", ["stages.0.batch_tokens", "list of 2", "[64]"]),
        (
            "{seq_len: 64, batch_tokens: 64, until_tokens: 63}",
            ["stages.0.until_tokens", "at least 64", "seq_len=64", "got 63"],
        ),
        (
            "{seq_len: 64, batch_tokens: 64, until_tokens: 640}, {seq_len: 64, batch_tokens: 64, until_tokens: 320}",
            ["stages.1.until_tokens", "at least 704", "640", "got 320"],
        ),
        (
            "{seq_len: 64, batch_tokens: 64, until_tokens: 640}, {seq_len: 64, batch_tokens: 64, until_tokens: 640}",
            ["stages.1.until_tokens", "at least 704", "seq_len=64", "got 640"],
        ),
        (
            "{seq_len: 64, batch_tokens: 64, until_tokens: 700}, {seq_len: 128, batch_tokens: 128, until_tokens: 767}",
            ["stages.1.until_tokens", "at least 768", "seq_len=128", "640", "got 767"],
        ),
        (
            "{seq_len: 64, batch_tokens: 64}, {seq_len: 64, batch_tokens: 64, until_tokens: 640}",
            ["stages.0.until_tokens", "null", "last"],
        ),
    ],
)
def test_impossible_curriculum_is_refused(problems, stages, parts):
    """Each impossible row of the stage table is exactly one problem with its number, values and what would be right."""
    (line,) = problems(f"schedule: {{stages: [{stages}]}}")
    assert line.startswith("schedule.stages")
    assert [part for part in parts if part not in line] == []


STAGE = "{seq_len: 64, batch_tokens: 64, until_tokens: 640}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"schedule: {{stages: [{STAGE}], warmup_tokens: 640}}", ["schedule.warmup_tokens", "640 tokens", "got 640"]),
        ("schedule: {decay: wsd, decay_fraction: 1.5}", ["schedule.decay_fraction", "at most 1", "1.5"]),
        ("train: {micro_batch_tokens: 128}", ["schedule.stages.0.seq_len", "train.micro_batch_tokens=128", "256"]),
        ("optimizer: {lr: 1e-3, min_lr: 2e-3}", ["optimizer.min_lr", "lr=0.001", "0.002"]),
        ("data: {tokenizer: {vocab_size: 256}}", ["data.tokenizer.vocab_size", "257", "got 256"]),
        ("data: {validation_fraction: 1}", ["data.validation_fraction", "got 1"]),
    ],
)
def test_impossible_run_is_refused(problems, text, parts):
    """Settings that contradict each other or a limit are exactly one problem with keys and values."""
    (line,) = problems(text)
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("sources", "parts"),
    [
        ("{name: a}", ["data.sources.0.builtin, files or dataset", "exactly one", "none"]),
        ("{name: a, builtin: code, files: b.txt}", ["builtin='code'", "files='b.txt'", "exactly one"]),
        ("{name: a b, builtin: code}", ["data.sources.0.name", "'a b'"]),
        ("{name: a, builtin: code, prompt: ''}", ["data.sources.0.prompt", "''"]),
        ("{name: a, builtin: code, epochs: 2, weight: 3}", ["data.sources.0.epochs", "epochs=2", "weight=3"]),
        ("{name: a, builtin: code, weight: 3}, {name: b, builtin: code}", ["data.sources.1.weight", "required"]),
        ("{name: a, builtin: code}, {name: a, builtin: prose}", ["data.sources.1.name", "unique", "'a'"]),
    ],
)
def test_impossible_sources_are_refused(problems, sources, parts):
    """Each contradiction within and between sources is exactly one problem with its number and values."""
    (line,) = problems(f"schedule: {{stages: [{STAGE}]}}\ndata: {{sources: [{sources}]}}")
    assert [part for part in parts if part not in line] == []


def test_learning_rate_may_stay_where_it_is(load):
    """A final learning rate equal to the peak is allowed, as a rate of 0 at the end is."""
    assert load("optimizer: {lr: 1e-3, min_lr: 1e-3}").optimizer.min_lr == 1e-3
    assert load("optimizer: {lr: 1e-3, min_lr: 0}").optimizer.min_lr == 0


def test_weights_need_a_length_of_the_run(problems):
    """Weights do not say how long a run is, so the last stage must."""
    (line,) = problems("data: {sources: [{name: a, builtin: code, weight: 1}]}")
    assert line.startswith("schedule.stages.0.until_tokens is required")


@pytest.mark.parametrize(
    "text",
    [
        "model: {n_heads: twelve, n_kv_heads: 5}",
        "model: {max_seq_len: long}\nschedule: {stages: [{seq_len: 512, batch_tokens: 512}]}",
        "schedule: {stages: [{seq_len: 64, batch_tokens: 64, until_tokens: soon}], warmup_tokens: 9_000_000}",
        "schedule: {stages: [{seq_len: 64, batch_tokens: lots}]}",
        "optimizer: {lr: fast, min_lr: 5}",
        "data: {sources: [{name: a, builtin: poems}]}",
    ],
)
def test_problem_that_depends_on_a_broken_setting_is_not_reported_twice(problems, text):
    """A setting that could not be read causes one line, not others that follow from it."""
    assert len(problems(text)) == 1


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (
            "data: {sources: [{files: a.txt, builtin: code, epochs: 1, weight: 1}]}\n"
            f"schedule: {{stages: [{STAGE}]}}",
            ["data.sources.0.name", "data.sources.0.builtin", "data.sources.0.epochs"],
        ),
        (
            "schedule: {decay_fraction: 3, stages: [{batch_tokens: 64, until_tokens: 64}]}",
            ["schedule.stages.0.seq_len", "schedule.decay_fraction"],
        ),
        (
            "schedule: {stages: [{batch_tokens: 64, until_tokens: 64}, {seq_len: 5120, batch_tokens: 5120}]}",
            ["schedule.stages.0.seq_len", "schedule.stages.1.seq_len must be at most model.max_seq_len=256"],
        ),
    ],
)
def test_missing_setting_hides_no_independent_problem(problems, text, keys):
    """A required setting that is missing does not keep the section's other problems from being reported."""
    found = problems(text)
    assert [key for key in keys if not any(line.startswith(key) for line in found)] == []


def test_problem_of_a_section_built_in_python_has_the_bare_key():
    """Constructing a section checks it as a file would, with keys relative to the section."""
    with pytest.raises(ConfigError, match=r"^n_heads must be a multiple of n_kv_heads, got n_heads=5, n_kv_heads=2"):
        dataclasses.replace(ModelConfig(), n_heads=5, n_kv_heads=2)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("model.n_layers=2", lambda c: c.model.n_layers == 2),
        ("optimizer.lr=1e-4", lambda c: c.optimizer.lr == 1e-4),
        ("model.tie_embeddings=true", lambda c: c.model.tie_embeddings is True),
        ("model.capacity_factor=null", lambda c: c.model.capacity_factor is None),
        ("data.cache_dir=a=b", lambda c: c.data.cache_dir == "a=b"),
        ("data.sources.1.epochs=3", lambda c: [s.epochs for s in c.data.sources] == [None, 3]),
        ("data.sources=[{name: x, files: [b, a]}]", lambda c: c.data.sources[0].files == ("b", "a")),
        ("schedule.stages.0.batch_tokens.1=640", lambda c: c.schedule.stages[0].batch_tokens == (64, 640)),
    ],
)
def test_override_replaces_one_setting(load, override, read):
    """An override's value is YAML; a number picks a list entry; a section the file lacks is made."""
    text = (
        "model: {capacity_factor: 1.5}\n"
        "data: {sources: [{name: a, builtin: code}, {name: b, builtin: prose}]}\n"
        "schedule: {stages: [{seq_len: 64, batch_tokens: [64, 128]}]}"
    )
    assert not read(load(text))
    assert read(load(text, override))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.n_layers", ["section.key=value", "'model.n_layers'"]),
        ("=3", ["section.key=value", "'=3'"]),
        ("model..n_layers=3", ["section.key=value", "'model..n_layers=3'"]),
        ("model.n_layers.deep=3", ["model.n_layers.deep", "model.n_layers must be a section", "2"]),
        ("data.sources.1.epochs=3", ["data.sources.1.epochs", "list of 1", "'1'"]),
        ("data.sources.first.epochs=3", ["data.sources.first.epochs", "list of 1", "'first'"]),
        ("model.n_layers=[", ["override model.n_layers", "not valid YAML"]),
        ("model.n_layrs=3", ["model.n_layrs is not a known key", "n_layers"]),
    ],
)
def test_wrong_override_is_one_clear_problem(problems, override, parts):
    """An override that cannot be applied says which and why."""
    (line,) = problems("model: {n_layers: 2}\ndata: {sources: [{name: a, builtin: code}]}", override)
    assert [part for part in parts if part not in line] == []


def test_problems_of_file_and_overrides_are_reported_together(problems):
    """A bad override does not hide the file's problems."""
    found = problems("model: {head_dim: 33}", "nonsense", "optimizer.lr=0")
    assert [line.split()[0] for line in found] == ["an", "model.head_dim", "optimizer.lr"]


def test_override_of_a_default_list_entry_says_that_the_file_has_no_list(problems):
    """An override into a list that only exists by default is refused in words that name the override."""
    (line,) = problems("", "schedule.stages.0.seq_len=64")
    assert "schedule.stages.0.seq_len" in line


@pytest.mark.parametrize("text", ["model: {n_layers: 2, n_layers: 3}", "model: {}\nmodel: {}"])
def test_key_given_twice_is_refused(problems, text):
    """A repeated key is an error that names it, not a silent replacement."""
    (line,) = problems(text)
    assert "given twice" in line
    assert ("'n_layers'" if "n_layers" in text else "'model'") in line


def test_merge_keys_work(load):
    """YAML's ``<<`` copies a stage into the next one, and a key beside it wins."""
    first = "&first {seq_len: 64, batch_tokens: 64, until_tokens: 64}"
    config = load(f"schedule: {{stages: [{first}, {{<<: *first, until_tokens: 128}}]}}")
    assert config.schedule.stages[1] == StageConfig(seq_len=64, batch_tokens=64, until_tokens=128)


def test_yaml_tags_execute_nothing(problems, tmp_path):
    """A YAML tag that would run code is refused and runs nothing, in the file and in an override."""
    tag = f"!!python/object/apply:os.mkdir [{tmp_path / 'made'}]"
    assert "not valid YAML" in problems(f"model: {tag}")[0]
    assert "not valid YAML" in problems("", f"model.n_layers={tag}")[0]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "part"), [("just words", "'just words'"), ("[1]", "[1]"), ("model: [", "not valid YAML")]
)
def test_file_that_is_no_config_is_refused(problems, text, part):
    """A file that is not a mapping of sections is one problem that names the file and what it holds."""
    (line,) = problems(text)
    assert "run.yaml" in line
    assert part in line


def test_config_that_is_not_utf8_is_refused(tmp_path):
    """Bytes that are not UTF-8 are one problem that names the file."""
    path = tmp_path / "latin.yaml"
    path.write_bytes("# caf\u00e9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8"):
        load_run_config(path)


def test_missing_config_lists_the_known_ones():
    """A name that is neither a path nor in configs/ is answered with the configs there are."""
    with pytest.raises(FileNotFoundError, match=r"no config at tinny.*tiny\.yaml"):
        load_run_config("tinny")


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", str(CONFIGS / "tiny.yaml")])
def test_config_is_found_by_name_and_by_path(name, tmp_path, monkeypatch):
    """A path, a name in configs/ and that name without its suffix are the same config from any folder."""
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONFIGS / "tiny.yaml"


def test_path_wins_over_a_name_in_configs(tmp_path, monkeypatch):
    """A file in the current folder is taken before one of the same name in configs/."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text("model: {n_layers: 7}", encoding="utf-8")
    assert load_run_config("tiny.yaml").model.n_layers == 7


def test_empty_file_is_all_defaults(load):
    """A file without settings is the default run, which is valid."""
    assert load("") == RunConfig() == load("model: {}")


def test_config_is_frozen():
    """A setting cannot be changed after it was checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().model.n_layers = 3


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"), min_size=1)
models = st.builds(
    ModelConfig,
    n_layers=st.integers(1, 10_000),
    n_heads=st.integers(1, 8).map(lambda n: 2 * n),
    head_dim=st.integers(1, 512).map(lambda n: 2 * n),
    norm_eps=st.floats(1e-30, 1e30),
    capacity_factor=st.none() | st.floats(1e-3, 1e3),
    tie_embeddings=st.booleans(),
    balance=st.sampled_from(["loss", "bias", "none"]),
)
sources = st.builds(
    SourceConfig,
    name=st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True),
    files=st.lists(texts, min_size=1).map(tuple) | texts,
    prompt=texts,
    epochs=st.none() | st.floats(1e-3, 1e3),
)
stages = st.builds(
    lambda n, k: StageConfig(seq_len=n, batch_tokens=k if isinstance(k, int) else tuple(k), until_tokens=n * 64),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 9).map(lambda n: 8 * n) | st.lists(st.integers(1, 9).map(lambda n: 8 * n), min_size=2, max_size=2),
)


@law
@given(models, sources, stages, texts, st.floats(1e-12, 1e12))
def test_yaml_of_a_config_reads_back_equal(tmp_path_factory, model, source, stage, cache_dir, lr):
    """``to_yaml`` then ``load_run_config`` gives an equal config, whatever its texts and numbers are."""
    config = RunConfig(
        model=model,
        data=DataConfig(sources=(source,), cache_dir=cache_dir),
        schedule=ScheduleConfig(stages=(stage,)),
        optimizer=OptimizerConfig(lr=lr),
        train=TrainConfig(seed=3),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_run_config(path) == config


@pytest.mark.parametrize("prompt", ["\x85", "\u2028", "a\u2029b", "\n", " ", "null", "1e-4", "\ufeff", "#", "\t- x: y"])
def test_yaml_of_a_config_keeps_text_that_yaml_could_mistake(load, prompt):
    """Line separators, words and numbers in a text setting survive the round trip as that text."""
    config = RunConfig(data=DataConfig(sources=(SourceConfig(name="a", builtin="code", prompt=prompt),)))
    assert load(to_yaml(config)) == config


def test_yaml_of_a_config_has_every_key():
    """The saved config states every setting, so that a later default changes nothing."""
    written = yaml.safe_load(to_yaml(RunConfig()))
    assert written == to_plain(RunConfig())
    assert set(written["model"]) == {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(written["data"]["tokenizer"]) == {field.name for field in dataclasses.fields(TokenizerConfig)}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_config_builds_on_meta(path):
    """Every YAML in configs/ is valid and describes a model that can be built; head_dim is one that kernels like."""
    config = load_run_config(path)
    model_config = config.model
    if model_config.vocab_size is None:
        model_config = dataclasses.replace(model_config, vocab_size=config.data.tokenizer.vocab_size)
    with torch.device("meta"):
        model = MoEGPT(model_config)
    assert len([p for p in model.parameters() if p.is_meta]) == len(list(model.parameters())) > 0
    assert model_config.head_dim in (32, 64, 128)


def _numbers(section: type, prefix: str = "") -> Iterator[str]:
    """Yield the keys of a config that take whole numbers."""
    for name, annotation in annotations_of(section).items():
        inside = section_in(annotation)
        if inside:
            yield from _numbers(inside, f"{prefix}{name}." + "0." * is_list(annotation))
        elif "whole" in expectation(annotation):
            yield prefix + name


@pytest.mark.parametrize("key", list(_numbers(RunConfig)))
@pytest.mark.parametrize("number", [2**63, 10**30])
def test_whole_numbers_that_eight_bytes_do_not_hold_are_refused(problems, key, number):
    """For every key; torch, numpy and itertools would fail at them later."""
    text = "schedule: {stages: [{seq_len: 8, batch_tokens: 8}]}\ndata: {sources: [{name: a, builtin: code}]}"
    text += "\nsft: {sources: [{name: a, builtin: functions}]}"
    assert any(re.match(rf"{key} must be .*, got {number}$", line) for line in problems(text, f"{key}={number}"))


@pytest.mark.parametrize("key", ["epochs", "weight"])
def test_a_source_is_read_a_number_of_times_that_can_be_counted(problems, key):
    """Its product with the tokens of the source is a number of tokens."""
    line = f"data.sources.0.{key} must be a number above 0 and at most 10^9 or null, got 1e+300"
    assert problems(f"data: {{sources: [{{name: a, builtin: code, {key}: 1.0e+300}}]}}") == [line]


@pytest.mark.parametrize(
    ("factor", "n_experts", "ratio"),
    [(1.1, 10, (11, 100)), (1e30, 4, (1, 1)), (7, 4, (1, 1)), (1e-300, 4, (1, 10**9)), (1.25, 3, (5, 12))],
)
def test_capacity_is_a_ratio_of_small_numbers(factor, n_experts, ratio):
    """Exact where its digits allow; products with a number of assignments fit into eight bytes."""
    assert ModelConfig(capacity_factor=factor, n_experts=n_experts).capacity_ratio == ratio
    assert max(ModelConfig(capacity_factor=1.2345678901234567, n_experts=7).capacity_ratio) <= 10**9


@pytest.mark.parametrize("text", ["1:30", "-1:30", "1:30.5", "190:20:30", "2024-01-01", "2024-01-01 10:00:00", "0o17"])
def test_numbers_and_dates_of_yaml_1_1_are_text(text, problems, load):
    """No number has a colon: 1:30 is not 90. Where text is wanted, what was typed is the text."""
    rest = "data: {sources: [{name: a, builtin: code}]}"
    expected = [f"optimizer.lr must be a number above 0, got {text!r}"]
    assert problems(rest, f"optimizer.lr={text}") == expected
    assert problems(f"{rest}\noptimizer: {{lr: {text}}}") == expected
    config = load(rest, f"data.sources.0.prompt={text}")
    assert config.data.sources[0].prompt == text
    assert load(to_yaml(config)) == config


@pytest.mark.parametrize(("text", "number"), [("017", 17), ("1_000", 1000), ("0x10", 16), ("0", 0), ("1e3", 1000)])
def test_whole_numbers_are_decimal_unless_marked(text, number, load):
    """A zero in front does not make a number octal."""
    assert load("data: {sources: [{name: a, builtin: code}]}", f"train.seed={text}").train.seed == number


@pytest.mark.parametrize(("text", "number"), [("0.5", 0.5), ("00.5", 0.5), ("-0", 0.0), ("1_0.5", 10.5), ("5e-1", 0.5)])
def test_fractions_stay_fractions(text, number, load):
    """With and without a zero in front."""
    config = load("data: {sources: [{name: a, builtin: code}]}", f"loss.router_z_loss_weight={text}")
    assert config.loss.router_z_loss_weight == number
