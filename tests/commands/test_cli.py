"""What every command shares: errors as lines, help for every flag, a quick start, commands that can be copied."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from run_scripts import command, script

from moe_gpt.commands import train
from moe_gpt.commands.app import COMMANDS, FAMILIES, run_main
from moe_gpt.commands.next_command import command_line, repeated
from moe_gpt.commands.options import describe_settings
from moe_gpt.config import AdaptersConfig, ConversationSourceConfig, MupBase, RunConfig, SftConfig
from moe_gpt.config.post_training import DpoConfig, PairsConfig, PromptsConfig, RewardConfig, RlConfig, RuleConfig
from moe_gpt.config.run import STAGES
from moe_gpt.config.vision import PictureSourceConfig, SeeConfig
from moe_gpt.config.yaml import to_plain
from moe_gpt.errors import ConfigError, InputError
from moe_gpt.report.words import say

REPOSITORY = Path(__file__).resolve().parents[2]


def python(*arguments: str | Path, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess:
    """Run this interpreter, with this checkout's package."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


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
def test_bad_input_becomes_lines_and_status_2(capsys, error, lines):
    """Bad input and files that cannot be used end a command with status 2 and one ``error:`` line for each problem."""
    with pytest.raises(SystemExit) as caught:
        run_main(raising(error))
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "".join(f"error: {line}\n" for line in lines))


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError("bug"), RuntimeError("bug"), AssertionError("bug")])
def test_real_bugs_come_through(error):
    """An error that is not the user's keeps its type and traceback."""
    with pytest.raises(type(error), match="bug"):
        run_main(raising(error))


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (143, 143)])
def test_exit_status_is_what_main_returns(returned, status):
    """The exit status is main's return value, 0 where there is none."""
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: returned)
    assert caught.value.code == status


def test_interruption_outside_of_the_steps_says_how_to_go_on(capsys, monkeypatch):
    """Before the first step, or while scores are made."""
    monkeypatch.setattr(sys, "argv", ["moe-gpt", "finetune", "tiny-chat.yaml"])
    monkeypatch.setattr(train, "_train", lambda *_: interrupt())
    assert train.run_command("finetune", "tiny-chat.yaml", [], train.NO_OPTIONS) == 130
    assert "interrupted; continue with:" in (said := capsys.readouterr().err)
    assert said.endswith("finetune tiny-chat.yaml --resume\n")


def interrupt():
    """Press Ctrl-C."""
    raise KeyboardInterrupt


def test_interruption_exits_with_130(capsys):
    """Ctrl-C ends a command with status 130 and a word, not a traceback."""
    with pytest.raises(SystemExit) as caught:
        run_main(raising(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["train"], "CONFIG"),
        (["generate"], "MODEL"),
        (["train", "tiny.yaml", "--max-steps", "0"], "--max-steps must be .* got 0"),
        (["train", "tiny.yaml", "--max-steps", "0.5"], "--max-steps must be .* got 0.5"),
        (["train", "tiny.yaml", "--max-minutes", "inf"], "--max-minutes must be .* got inf"),
        (["train", "tiny.yaml", "--max-steps", str(2**63)], f"--max-steps must be .* got {2**63}"),
        (["generate", "x", "--top-k", "1e30"], "--top-k must be .* got 1e30"),
        (["train", "tiny.yaml", "--max-steps"], "--max-steps needs a value"),
        (["train", "tiny.yaml", "--max-step", "3"], "--max-step.*--max-steps"),
        (["train", "tiny.yaml", "--device", "gpu"], "gpu"),
        (["train", "tiny.yaml", "model.n_layer=3"], "model.n_layer.*n_layers"),
        (["train", "tiny.yaml", "--n-layers", "3"], "--n-layers.*model.n_layers="),
        (["train", "tiny.yaml", "--model.n-layers", "3"], "--model.n-layers.*model.n_layers="),
        (["trian"], "trian.*train"),
        (["generate", "runs/tiny", "class Reader"], "class Reader.*--prompt"),
        (["train", "tiny.yaml", "small.yaml"], "small.yaml.*one config"),
        (["train", "tiny.yaml", "--model.n_layers=8"], "--model.n_layers=8.*model.n_layers="),
        (["plan", "small.yaml", "--tensor", "0"], "--tensor must be .* got 0"),
        (["generate", "x", "--top-k", "-3"], "--top-k must be .* got -3"),
        (["generate", "x", "--prompt", "- a"], "--prompt=VALUE"),
        (["bench", "train", "--shape", "Q"], "Q.*--shape"),
        (["export", "runs/tiny"], "FOLDER"),
        (["report"], "RUNS"),
        (["plan"], "CONFIG"),
    ],
)
def test_bad_command_line_is_one_line_that_names_the_word(words, wanted):
    """A command line that cannot be read ends with status 2 and one line: what is wrong, and the nearest right word."""
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: .*{wanted}.*\n", done.stderr), done.stderr


@pytest.mark.parametrize("width", ["80", "60"])
@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["bench", "train"], ["checkpoint", "prune"]])
def test_help_fits_the_terminal(words, width):
    """Help of every command exits with 0, names every flag with a word, and is no wider than the terminal."""
    done = command(*words, "--help", COLUMNS=width, TERM="xterm", FORCE_COLOR="0", TTY_COMPATIBLE="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= int(width)


def test_every_command_of_the_list_can_be_called():
    """The list of commands, which help is made of without importing them, has functions of these names."""
    import importlib

    for name in COMMANDS:
        assert callable(getattr(importlib.import_module(f"moe_gpt.commands.{name}"), name))
    for family, members in FAMILIES.items():
        module = importlib.import_module(f"moe_gpt.commands.{family}")
        for name in members:
            assert callable(getattr(module, "list_" if name == "list" else name))


def test_version_is_the_package_s():
    """--version prints it alone."""
    import moe_gpt

    assert command("--version").stdout == f"{moe_gpt.__version__}\n"


def with_every_section() -> dict:
    """Return a plain config that has the sections that may be left out; a run has one of them."""
    pairs = PairsConfig(builtin="lines")
    stages = {
        "sft": SftConfig(sources=(ConversationSourceConfig(name="a", builtin="functions"),)),
        "reward": RewardConfig(pairs=pairs),
        "dpo": DpoConfig(pairs=pairs),
        "rl": RlConfig(prompts=PromptsConfig(builtin="lines"), rewards=(RuleConfig(rule="parses"),)),
        "see": SeeConfig(sources=(PictureSourceConfig(builtin="scenes"),)),
    }
    assert stages.keys() == set(STAGES)
    sections = stages | {"adapters": AdaptersConfig()}
    values = to_plain(RunConfig()) | {name: to_plain(section) for name, section in sections.items()}
    values["model"]["mup_base"] = to_plain(MupBase(d_model=64, d_ff=64, n_layers=2))
    return values


def keys_of(values: dict, prefix: str = "") -> list[str]:
    """Return the dotted keys of a plain config; of a list of sections, those of its first entry."""
    keys = []
    for name, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            name, value = f"{name}.0", value[0]
        keys += keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return keys


def test_describe_settings_lists_every_key(monkeypatch):
    """Every key of a config has one entry: its dotted name, its default, its meaning and what it may be."""
    monkeypatch.setenv("COLUMNS", "1000")
    lines = list(describe_settings())
    keys = keys_of(with_every_section())
    assert len(keys) > 50
    for key in keys:
        (line,) = [line for line in lines if line.startswith(f"  {key} (")]
        assert re.fullmatch(r"  \S+ \(.*\): \S.* \[\S.*\]", line), line
    sections = [line for line in lines if line.startswith("\n")]
    assert len(sections) >= 8
    for line in sections:
        assert re.fullmatch(r"\n\S+: \S.*", line), line


@pytest.mark.parametrize(
    "start",
    [
        "  model.n_layers (4): Transformer blocks. [a whole number from 1 to 10,000]",
        "  model.vocab_size (null): ",
        "  data.sources.0.name (required): ",
        "\nschedule.stages.0: The stage table.",
    ],
)
def test_describe_settings_shows_default_and_meaning(start):
    """An entry shows the default, ``null`` and ``required`` as the YAML file has them."""
    assert any(line.startswith(start) for line in describe_settings())


def test_import_of_the_package_loads_nothing_heavy():
    """``import moe_gpt`` and the command line load pydantic, but neither torch nor the data libraries."""
    wanted = "{'torch', 'numpy', 'datasets', 'tokenizers', 'transformers', 'matplotlib', 'pandas', 'pydantic'}"
    code = f"import sys, moe_gpt, moe_gpt.commands.app, moe_gpt.config; print(*({wanted} & set(sys.modules)))"
    assert python("-c", code).stdout.split() == ["pydantic"]


def test_unknown_public_name_is_an_attribute_error():
    """A name that the package does not have raises AttributeError, which names it."""
    import moe_gpt

    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = moe_gpt.NoSuchName


def test_public_names_load_are_listed_and_described():
    """Every name of ``__all__`` loads, stands in ``dir``, and has a place in the package's docstring."""
    import moe_gpt

    for name in moe_gpt.__all__:
        assert getattr(moe_gpt, name).__doc__
        assert name in dir(moe_gpt)
        assert re.search(rf"\b{name}\b", moe_gpt.__doc__)


def test_train_help_lists_every_key_without_importing_torch():
    """``train.py --help`` names every key of a config and stays quick: torch is not imported."""
    result = python("-X", "importtime", "scripts/train.py", "--help")
    assert result.returncode == 0
    assert [key for key in keys_of(with_every_section()) if f"  {key} (" not in result.stdout] == []
    imported = set(re.findall(r"\|\s+(\S+)$", result.stderr, flags=re.MULTILINE))
    assert "moe_gpt.config" in imported
    assert "torch" not in imported


def test_train_reports_all_problems_of_a_bad_config(tmp_path, monkeypatch):
    """A bad config ends train.py with status 2, a line for each problem of file and overrides, and no traceback."""
    (tmp_path / "bad.yaml").write_text("model: {n_layer: 2, head_dim: 33}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    result = script("train.py", "--config", "bad.yaml", "optimizer.lr=-1", "nonsense")
    assert (result.returncode, result.stdout) == (2, "")
    keys = ["an override", "model.n_layer ", "model.head_dim ", "optimizer.lr "]
    lines = result.stderr.splitlines()
    assert len(lines) == len(keys)
    assert all(line.startswith(f"error: {key}") for line, key in zip(lines, keys, strict=True))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["--config", "nothing.yaml"], ["nothing.yaml"]])
def test_train_says_which_configs_there_are(tmp_path, monkeypatch, words):
    """A config that does not exist, by flag or by place, ends with status 2 and one line that lists the known ones."""
    monkeypatch.chdir(tmp_path)
    result = command("train", *words)
    assert result.returncode == 2
    assert re.fullmatch(r"error: no config at nothing\.yaml .*tiny\.yaml.*\n", result.stderr)


@pytest.mark.parametrize(
    ("program", "start"),
    [
        ("scripts/train.py", ["{python}", "scripts/generate.py"]),
        ("/some where/scripts/train.py", ["{python}", "'/some where/scripts/generate.py'"]),
        ("/elsewhere/bin/moe-gpt", ["/elsewhere/bin/moe-gpt", "generate"]),
        ("/x/moe_gpt/__main__.py", ["{any}", "generate"]),
    ],
)
def test_next_command_starts_as_this_one_did(monkeypatch, program, start):
    """A script names its neighbour, the command itself; words are quoted where a shell would split them."""
    monkeypatch.setattr(sys, "argv", [program, "train", "tiny.yaml"])
    line = command_line("generate", "runs/my run", "--prompt", "def ")
    assert line.endswith(" 'runs/my run' --prompt 'def '")
    if start[0] == "{any}":
        assert re.search(r"(moe-gpt|python\S* -m moe_gpt) generate ", line)
    else:
        assert f"{' '.join(start[1:])} " in line
        assert start[0] == "{python}" or line.startswith(start[0])


def test_paths_with_a_dash_are_no_options(tmp_path, monkeypatch):
    """In every command that is printed; the command runs as it stands. Prompts and options stay as they are."""
    monkeypatch.setattr(sys, "argv", ["/x/moe-gpt", "train"])
    line = command_line("generate", Path("-b dash"), "--prompt", "x", Path("a-b"), Path("/-c"))
    assert line.endswith(" generate './-b dash' --prompt x a-b /-c")
    assert say("{{ path | quote }}", path=Path("-bdash")) == "./-bdash"
    monkeypatch.chdir(tmp_path)
    refused = command("generate", shlex.split(line)[2], "--prompt", "x")
    assert refused.stderr.startswith("error: no complete checkpoint at -b dash;")


def test_resume_repeats_the_command_line(monkeypatch):
    """What is printed to go on is the same line with --resume, once."""
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--config", "a b.yaml", "--resume"])
    assert repeated("train", "--resume").endswith("scripts/train.py --config 'a b.yaml' --resume")
    monkeypatch.setattr(sys, "argv", ["/x/moe-gpt", "train", "tiny.yaml"])
    assert repeated("train", "--resume") == "/x/moe-gpt train tiny.yaml --resume"
