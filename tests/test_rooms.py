"""The house: a room of moe_gpt imports only rooms above it in ``ROOMS``, and says in a sentence what it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "moe_gpt"
ROOMS = (
    "errors",
    "files",
    "terminal",
    "config",
    "ops",
    "model",
    "data",
    "scale",
    "speech",
    "vision",
    "measure",
    "inference",
    "interop",
    "distributed",
    "training",
    "post_training",
    "serving",
    "plan",
    "report",
    "bench",
    "api",
    "studies",
    "commands",
)
"""From the ground up. A new room takes its place here in the commit that adds it."""
FOLDERS = [room for room in ROOMS if room != "errors"]


def room_of(module: str) -> str:
    """Return the room of ``moe_gpt.room.file``."""
    return module.split(".")[1] if "." in module else ""


def imports_of(source: str) -> Iterator[str]:
    """Yield every module of the package that a source imports, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "moe_gpt")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moe_gpt":
            is_package = node.module == "moe_gpt"
            yield from (f"moe_gpt.{alias.name}" if is_package else str(node.module) for alias in node.names)


def wrong_imports(room: str, source: str) -> list[str]:
    """Return the imports of rooms that are not above ``room``."""
    known = (*ROOMS[: ROOMS.index(room) + 1], "__version__")
    return [module for module in imports_of(source) if room_of(module) and room_of(module) not in known]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_rooms_above_them(room):
    """So the graph of imports between rooms has no circle."""
    files = list((PACKAGE / room).rglob("*.py")) if room in FOLDERS else [PACKAGE / f"{room}.py"]
    assert files
    assert [(file.name, module) for file in files for module in wrong_imports(room, file.read_text())] == []


def test_every_room_has_a_place():
    """A folder or file that the list lacks would be free to import anything."""
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("training", "from moe_gpt.report.report import write_report"),
        ("training", "if TYPE_CHECKING:\n    from moe_gpt.commands.train import main"),
        ("model", "def f():\n    import moe_gpt.training.loop"),
        ("interop", "from moe_gpt.plan.quantities import Quantity"),
        ("terminal", "from moe_gpt import config"),
    ],
)
def test_wrong_imports_are_found(room, source):
    """At the top, for type checking, inside functions, and in each form."""
    assert len(wrong_imports(room, source)) == 1


def described(room: str) -> tuple[str, str]:
    """Return the first sentence of a room's docstring, and the file that it names to read first."""
    text = " ".join((ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or "").split())
    found = re.fullmatch(r"(.+?\.) (?:.* )?Read ``(\w+\.py)`` first\b.*", text)
    assert found, f"{room}/__init__.py must say what the room is and end with: Read ``file.py`` first."
    return found[1], found[2]


@pytest.mark.parametrize("room", FOLDERS)
def test_readme_says_of_each_room_what_its_docstring_says(room):
    """One sentence, and the file to read first, which is there."""
    sentence, first = described(room)
    assert (PACKAGE / room / first).is_file()
    line = f"| `{room}/` | {sentence.replace('``', '`')} | `{first}` |"
    assert line in (PACKAGE.parent / "README.md").read_text()
