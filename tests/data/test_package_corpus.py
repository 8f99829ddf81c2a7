"""The sources of installed packages: which files, in which order, on which side of the split."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from moe_gpt.config import RunConfig, SourceConfig
from moe_gpt.data.corpus import describe_origin, iterate_documents
from moe_gpt.data.package_corpus import iterate_packages, versions_of
from moe_gpt.errors import ConfigError, InputError

FILES = {
    "made/__init__.py": b"a = 1\n",
    "made/inner/one.py": b"b = 1\n",
    "made/inner/deep/two.py": b"c = 1\n",
    "made/tests/test_one.py": b"assert True\n",
    "made/data.txt": b"no source",
    "made/latin.py": "é".encode("latin-1"),
    "made/empty.py": b"\n",
    "made/large.py": b"x" * 200_001,
}


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """A package that looks as if it were installed."""
    info = tmp_path / "made-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made\nVersion: 1.5\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*FILES, "made/gone.py"]))
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_sources_of_a_package_are_its_documents(made):
    """Without tests, other files, those that are no text or very large, and those that are gone; in a fixed order."""
    assert [tuple(document) for document in iterate_packages(["made"])] == [
        ("a = 1\n", "made"),
        ("c = 1\n", "made/inner"),
        ("b = 1\n", "made/inner"),
    ]


def test_it_is_a_source_whose_origin_has_the_versions(made):
    """So another version is another text."""
    source = SourceConfig(name="own", builtin="packages", packages=("made",))
    assert len(list(iterate_documents(source))) == 3
    assert describe_origin(source)["packages"] == {"made": "1.5"}
    assert all(Path(path).is_file() for path, *_ in describe_origin(source)["stat"])


def test_the_packages_of_the_default_are_installed():
    """Wherever moe_gpt is, and they are many documents."""
    default = SourceConfig(name="own", builtin="packages").packages
    assert versions_of(default)["torch"] == importlib.metadata.version("torch")


def test_a_package_that_is_missing_is_named(made):
    """With the list that would do."""
    with pytest.raises(InputError, match=r"needs no_such_package installed.*packages: \[made\]"):
        list(iterate_packages(["made", "no_such_package"]))


def test_packages_belong_to_their_source_alone():
    """Elsewhere they would be ignored."""
    with pytest.raises(ConfigError, match="packages is for builtin: packages only"):
        RunConfig.from_mapping({"data": {"sources": [{"name": "a", "builtin": "code", "packages": ["torch"]}]}})
