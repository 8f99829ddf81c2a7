"""What every script shares: errors as lines, help for every key, and a quick start."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_gpt.commands.cli import count_argument, describe_settings, positive_argument, run_script
from moe_gpt.config import RunConfig
from moe_gpt.config.yaml import to_plain
from moe_gpt.errors import ConfigError, InputError

REPOSITORY = Path(__file__).resolve().parents[2]


def python(*arguments: str | Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """Run this interpreter in the repository."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=60)


def raising(error: BaseException):
    """Return a main function that fails."""

    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (InputError("n must be 1, got 2"), ["n must be 1, got 2"]),
        (ConfigError(["a is wrong", "b is wrong"]), ["a is wrong", "b is wrong"]),
        (FileNotFoundError("no config at x"), ["no config at x"]),
        (FileNotFoundError(2, "No such file or directory", "x.yaml"), ["No such file or directory: x.yaml"]),
        (PermissionError(13, "Permission denied", "/root/x"), ["Permission denied: /root/x"]),
    ],
)
def test_run_script_turns_bad_input_into_lines_and_status_2(capsys, error, lines):
    """Bad input and files that cannot be used end a script with status 2 and one ``error:`` line for each problem."""
    with pytest.raises(SystemExit) as caught:
        run_script(raising(error))
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "".join(f"error: {line}\n" for line in lines))


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError("bug"), RuntimeError("bug"), AssertionError("bug")])
def test_run_script_lets_real_bugs_through(error):
    """An error that is not the user's keeps its type and traceback."""
    with pytest.raises(type(error), match="bug"):
        run_script(raising(error))


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (143, 143)])
def test_run_script_exits_with_what_main_returns(returned, status):
    """The exit status is main's return value, 0 where there is none."""
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: returned)
    assert caught.value.code == status


def test_run_script_exits_with_130_when_interrupted(capsys):
    """Ctrl-C ends a script with status 130 and a word, not a traceback."""
    with pytest.raises(SystemExit) as caught:
        run_script(raising(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("parse", "text", "value"), [(count_argument, "3", 3), (positive_argument, "1e-3", 0.001)])
def test_argument_is_read_as_a_number(parse, text, value):
    """The argument types return the number that the text spells."""
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [(count_argument, "0"), (count_argument, "-1"), (positive_argument, "0"), (positive_argument, "inf")],
)
def test_argument_out_of_range_shows_the_limit_and_the_value(parse, text):
    """A number out of range is refused with what it must be and what it is."""
    with pytest.raises(argparse.ArgumentTypeError, match=rf"must be .*, got {text}"):
        parse(text)


def keys_of(values: dict, prefix: str = "") -> list[str]:
    """Return the dotted keys of a plain config; of a list of sections, those of its first entry."""
    keys = []
    for name, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            name, value = f"{name}.0", value[0]
        keys += keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return keys


def test_describe_settings_lists_every_key():
    """Every key of a config has one line: its dotted name, its default, its meaning and what it may be."""
    lines = list(describe_settings())
    keys = keys_of(to_plain(RunConfig()))
    assert len(keys) > 50
    for key in keys:
        (line,) = [line for line in lines if line.startswith(f"  {key} (")]
        assert re.fullmatch(r"  \S+ \(.*\): \S.* \[\S.*\]", line), line


@pytest.mark.parametrize(
    "start",
    [
        "  model.n_layers (4): Transformer blocks. [a whole number of at least 1]",
        "  model.vocab_size (null): ",
        "  data.sources.0.name (required): ",
        "\nschedule.stages.0: The stage table.",
    ],
)
def test_describe_settings_shows_default_and_meaning(start):
    """A line shows the default, ``null`` and ``required`` as the YAML file has them."""
    assert any(line.startswith(start) for line in describe_settings())


def test_import_of_the_package_loads_nothing_heavy():
    """``import moe_gpt`` and the command line load pydantic, but neither torch nor the data libraries."""
    wanted = "{'torch', 'numpy', 'datasets', 'tokenizers', 'transformers', 'matplotlib', 'pydantic'}"
    code = f"import sys, moe_gpt, moe_gpt.commands.cli, moe_gpt.config; print(*({wanted} & set(sys.modules)))"
    assert python("-c", code).stdout.split() == ["pydantic"]


def test_unknown_public_name_is_an_attribute_error():
    """A name that the package does not have raises AttributeError, which names it."""
    import moe_gpt

    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = moe_gpt.NoSuchName


@pytest.mark.parametrize("name", ["MoEGPT", "ModelConfig", "RunConfig", "load_run_config", "TokenStore"])
def test_public_names_are_listed_and_load(name):
    """A name is in ``__all__`` exactly if the package has it."""
    import moe_gpt

    assert (name in moe_gpt.__all__) == hasattr(moe_gpt, name)


def test_train_help_lists_every_key_without_importing_torch():
    """``train.py --help`` names every key of a config and stays quick: torch is not imported."""
    result = python("-X", "importtime", "scripts/train.py", "--help")
    assert result.returncode == 0
    assert [key for key in keys_of(to_plain(RunConfig())) if f"  {key} (" not in result.stdout] == []
    imported = set(re.findall(r"\|\s+(\S+)$", result.stderr, flags=re.MULTILINE))
    assert "moe_gpt.config" in imported
    assert "torch" not in imported


def test_train_reports_all_problems_of_a_bad_config(tmp_path):
    """A bad config ends train.py with status 2, a line for each problem of file and overrides, and no traceback."""
    (tmp_path / "bad.yaml").write_text("model: {n_layer: 2, head_dim: 33}", encoding="utf-8")
    script = REPOSITORY / "scripts" / "train.py"
    result = python(script, "--config", "bad.yaml", "optimizer.lr=-1", "nonsense", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    keys = ["an override", "model.n_layer ", "model.head_dim ", "optimizer.lr "]
    lines = result.stderr.splitlines()
    assert len(lines) == len(keys)
    assert all(line.startswith(f"error: {key}") for line, key in zip(lines, keys, strict=True))
    assert not (tmp_path / "runs").exists()


def test_train_says_which_configs_there_are(tmp_path):
    """A config that does not exist ends train.py with status 2 and one line that lists the known ones."""
    result = python(REPOSITORY / "scripts" / "train.py", "--config", "nothing.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(r"error: no config at nothing\.yaml .*tiny\.yaml.*\n", result.stderr)
