"""The README and the pages are true: paths exist, commands parse, Python runs, numbers are those of the code."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import cyclopts
import pytest
import yaml

import moe_gpt
from moe_gpt.commands.app import COMMANDS, FAMILIES, make_app
from moe_gpt.config.yaml import CONFIGS, find_config, load_run_config
from moe_gpt.errors import InputError
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.training.saving.own_code import find_router

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAQ = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^```\w*\n.*?^```|^ {4}\S.*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(
    r"(?:^ *|`|; do |/bin/|time |time -v )(?:moe-gpt|python scripts/(\w+)\.py) ([^;`\n]+)", re.MULTILINE
)


def python_of(text: str) -> list[str]:
    """Return the blocks of Python of a page."""
    return [code for language, code in FENCED.findall(text) if language == "python"]


def commands_of(text: str) -> list[list[str]]:
    """Return the words behind ``moe-gpt`` of every command in a page's code; a script stands for its command."""
    commands = []
    for code in CODE.findall(re.sub(r"\\\n\s*", "", text)):
        for script, rest in COMMAND.findall(code):
            words = shlex.split(re.sub(r"\$\w+", "0", rest), comments=True)
            source = (ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8") if script else 'run("")'
            if found := re.search(r'run\("(\w*)"\)', source):
                commands.append([found[1], *words] if script else words)
    return commands


def check(words: list[str]) -> None:
    """Parse a command as ``moe-gpt`` would, and look at the settings that it changes; raise where one is wrong."""
    _, bound, _ = make_app().parse_args(words, exit_on_error=False, print_error=False)
    config = bound.arguments.get("config", "")
    if (CONFIGS / config).is_file():
        load_run_config(config, bound.arguments.get("overrides", ()))


def test_readme_paths_exist():
    """Every file and folder of the repository that the README names is there."""
    named = re.findall(r"(?<![\w/.-])((?:moe_gpt|scripts|configs|tests|docs)/[\w./-]*)", README)
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_readme_configs_exist():
    """Every config in a command is there, and every shipped config is mentioned."""
    for name in re.findall(r"(?:--config|moe-gpt (?:train|plan)) (\w\S+)", README):
        assert find_config(name).parent == CONFIGS
    assert [path.stem for path in CONFIGS.glob("*.yaml") if f"`{path.stem}`" not in README] == []


def test_readme_has_the_two_lines_that_ci_runs():
    """One line trains, one tests; each does all of its own set-up."""
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [line.split()[-1] for line in lines] == ["tiny.yaml", ".venv/bin/pytest"]
    assert all("pip install -e" in line for line in lines)


def test_readme_stays_short():
    """The README has fewer than 1,200 words."""
    assert len(README.split()) < 1200


def test_readme_pictures_are_small_and_have_a_background():
    """Each is below 150 kB; a drawing begins with a white area, so that it can be read on a dark page too."""
    pictures = [ROOT / path for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)]
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.stat().st_size < 150_000
        assert re.search(r'style="fill: (#?\w+)"', picture.read_text(encoding="utf-8"))[1] == "#ffffff"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_pages_parse(page):
    """Every command with its options, and every setting that it changes, is one that there is."""
    for words in commands_of(page.read_text(encoding="utf-8")):
        if words[0] != "X":  # stands for each command
            assert words[0] in {*COMMANDS, *FAMILIES} or words[0].startswith("--"), words
            if len(words) > 1:
                check(words)


def test_wrong_commands_are_found():
    """Commands are found in loops and as scripts, but not among the words of other programs; each error is seen."""
    assert commands_of("```bash\nfor x in 1; do moe-gpt report r/$x --watch; done\npip install moe-gpt b\n```\n") == [
        ["report", "r/0", "--watch"]
    ]
    assert commands_of("Say `python scripts/prepare_data.py --show` # or not") == [["prepare", "--show"]]
    for wrong in ("train tiny.yaml --max-step 3", "prepare tiny.yaml --shown", "train tiny.yaml model.n_layer=3"):
        with pytest.raises((InputError, cyclopts.CycloptsError), match=r"--max-step\b|--shown|n_layer\b"):
            check(wrong.split())


@pytest.fixture(scope="module")
def folder(small_values, tmp_path_factory):
    """A folder in which tiny.yaml is a smaller run, with that run and the router of the README."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(small_values), encoding="utf-8")
    moe_gpt.train(folder / "tiny.yaml", run_dir=folder / "runs" / "tiny", max_steps=2, say=lambda _: None)
    (folder / "my_router.py").write_text(python_of(README)[1], encoding="utf-8")
    return folder


COMPARISON = next(code for code in python_of(FAQ) if "FrozenRouter" in code)
BLOCKS = [code for code in [*python_of(README), *python_of(FAQ)] if code != COMPARISON]


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.split("\n\n")[-1].split("\n")[0][:40])
def test_python_of_pages_runs(code, folder, monkeypatch):
    """Each block runs as it stands, where the runs and files that it names are."""
    monkeypatch.chdir(folder)
    exec(compile(code, "page", "exec"), {"__name__": "page"})  # noqa: S102 (our own text)


def test_readme_says_how_to_use_python():
    """One block generates text, the other is the router, which trains as the command beside it says."""
    assert len(python_of(README)) == 2
    assert "generate" in python_of(README)[0]
    assert "--router my_router.py:MyRouter" in README


def test_readme_router_never_learns(folder, monkeypatch):
    """Trained as the README says, its weights take no gradient: without weight decay they stay as they began."""
    monkeypatch.chdir(folder)
    router = find_router("my_router.py:MyRouter")
    runs = [
        moe_gpt.train(
            "tiny.yaml", {"optimizer.weight_decay": 0}, f"runs/{steps}", max_steps=steps, make_router=router, say=str
        )
        for steps in (1, 3)
    ]
    first, later = (dict(run.state.model.named_parameters()) for run in runs)
    weights = [name for name in first if "router" in name]
    assert len(weights) == 2
    assert all(first[name].equal(later[name]) for name in weights)
    assert not first["embedding.weight"].equal(later["embedding.weight"])


def test_router_comparison_prints_both(capsys):
    """The questions compare a learned router with a frozen one: one line each."""
    exec(compile(COMPARISON, "faq.md", "exec"), {"__name__": "page"})  # noqa: S102 (our own text)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["Router", "FrozenRouter"]


def test_glossary_has_the_numbers_of_tiny():
    """Parameters, big epoch and learning rates that it names are those that the code computes."""
    config = load_run_config("tiny.yaml", ["model.vocab_size=2048"])
    counts = count_parameters(config.model)
    glossary = " ".join((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").split())
    for number in (counts.total, counts.active, counts.per_expert // config.model.n_layers, 2048):
        assert f"{number:,}" in glossary
    for stage in config.schedule.stages[:-1]:
        assert f"{stage.until_tokens:,}" in glossary
    assert f"warms up to {config.optimizer.lr} over {config.schedule.warmup_tokens:,} tokens" in glossary


def test_documents_name_files_that_are_there():
    """Every file and test that a page names exists."""
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # names what was there
            continue
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w/.-])((?:moe_gpt|scripts|configs|tests|docs)/[\w./-]*\w)", text)
        named = [path for path in named if "/room/" not in path]  # stands for each room
        assert [path for path in named if not (ROOT / path).exists()] == [], page.name
        tests = re.findall(r"(?<![\w/])test_\w+\.py", text)
        assert [name for name in tests if not any((ROOT / "tests").rglob(name))] == [], page.name


def test_pages_import_what_is_there():
    """Every name that code on a page imports from moe_gpt is one that it has."""
    for page in PAGES:
        for module, names in re.findall(r"from (moe_gpt[\w.]*) import ([\w, ]+)", page.read_text(encoding="utf-8")):
            found = importlib.import_module(module)
            assert [name for name in names.split(", ") if not hasattr(found, name.strip())] == [], page.name


def test_hooks_before_a_commit_are_checks_of_ci():
    """A commit is refused for nothing that CI would let pass, and the workflow runs what everybody can run."""
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [hook["id"] for hook in hooks["hooks"] if f".venv/bin/{hook['entry']}" not in checks] == []
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["checks"]["steps"][-1] == {"run": ".ci/run"}


def test_links_between_pages_lead_somewhere():
    """Every relative link of a page leads to a file, and to a heading of it where it names one."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in anchors, f"{page.name}: {target}"
