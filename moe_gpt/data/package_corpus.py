"""The sources of installed packages as text: tens of millions of tokens of code without a network.

It is for studies that need more distinct text than Python's own library has. Documents of one folder of a package are
on the same side of the train/validation split. The text depends on the versions that are installed, which the origin of
the source records.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_gpt.data.document import Document
from moe_gpt.errors import InputError

_LEFT_OUT = {"test", "tests", "testing", "__pycache__", "_vendor", "node_modules"}
_LARGEST = 200_000
"""Bytes of a file; larger ones are mostly tables that were generated."""


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each package.

    Raises:
        InputError: naming those that are not installed.
    """
    return {name: _version_of(name, packages) for name in packages}


def _version_of(name: str, packages: Sequence[str]) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"builtin: packages needs {name} installed; install it, or give the packages that there are: "
            f"packages: [{', '.join(each for each in packages if each != name)}]"
        ) from None


def package_files(packages: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield the name within its distribution and the path of each source file, sorted within a package."""
    for name in versions_of(packages):
        for file in sorted(filter(_is_source, importlib.metadata.files(name) or []), key=str):
            yield file.as_posix(), Path(str(file.locate()))


def _is_source(file: importlib.metadata.PackagePath) -> bool:
    is_kept = file.suffix == ".py" and not _LEFT_OUT.intersection(file.parts)
    return is_kept and Path(str(file.locate())).is_file()


def iterate_packages(packages: Sequence[str]) -> Iterator[Document]:
    """Yield the sources of packages, in a fixed order; files that are not UTF-8, empty or very large are left out."""
    for name, path in package_files(packages):
        text = _text_of(path)
        if text.strip():
            yield Document(text, "/".join(itertools.islice(name.split("/")[:-1], 2)))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _LARGEST else ""
    except UnicodeDecodeError:
        return ""
