"""Folders that the library ``datasets`` reads: what it would read wrong is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from moe_gpt.data.compressed import UnreadableFileError, format_suffix
from moe_gpt.data.disguises import FORMATS, format_of, refuse_disguise
from moe_gpt.errors import InputError
from moe_gpt.files.inside import inside, read_json

_ABOUT = re.compile(r"(?i)(readme|licen[cs]e|notice|citation|changelog|contributing)\.(txt|md)")
_KINDS = FORMATS | {".txt": "txt", ".text": "txt", ".md": "md"}
_AGAIN = "copy or write the whole folder again"


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` made the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved_split(folder: Path, split: str) -> Path:
    """Return the folder of a split in one that ``save_to_disk`` made, after checking the names of its files.

    Raises:
        UnreadableFileError: where there is no such split; where a file is missing, damaged, or outside of the folder.
    """
    try:
        names = [split] if inside(folder, "dataset_dict.json").is_file() else []
        there = read_json(folder, "dataset_dict.json")["splits"] if names else [_split_of(folder)]
        if split not in there:
            raise UnreadableFileError(f"has no split={split!r}; set split to one of: {', '.join(there)}")
        part = inside(folder, *names, "state.json").parent
        files = [file["filename"] for file in read_json(part, "state.json")["_data_files"]]
        missing = [name for name in ("dataset_info.json", *files) if not inside(folder, *names, name).is_file()]
    except InputError as error:
        raise UnreadableFileError(f"cannot be read: {error}") from None
    except (OSError, KeyError, TypeError) as error:
        raise UnreadableFileError(f"is not as save_to_disk writes it ({error}); {_AGAIN}") from None
    if missing:
        raise UnreadableFileError(f"is not whole: {part / missing[0]} is missing; {_AGAIN}")
    return part


def _split_of(folder: Path) -> str:
    return read_json(folder, "state.json")["_split"] or "train"


def check_folder(folder: Path, subset: str | None) -> None:
    """Compare a local dataset with what ``datasets`` can read as it stands.

    Its reader of tables takes the first cells for names of rows where lines have one cell more than the header. Of
    several formats it reads one. A card in the folder may name files elsewhere.

    Raises:
        UnreadableFileError: with what is wrong, and what would be right.
    """
    found = [path for path in folder.rglob("*") if path.name[0] != "."]
    try:
        for path in filter(Path.is_symlink, found):
            inside(folder, *path.relative_to(folder).parts)
    except InputError as error:
        raise UnreadableFileError(f"cannot be read: {error}, or write files: instead") from None
    paths = sorted(filter(Path.is_file, found))
    suffixes = {format_suffix(path) for path in paths if not _ABOUT.fullmatch(path.name)}
    _check_formats(folder, {_KINDS[suffix] for suffix in suffixes if suffix in _KINDS})
    for path in paths:
        if format_suffix(path) in (*FORMATS, ".txt"):
            _check_file(path)
    _check_card(folder, subset)


def _check_formats(folder: Path, kinds: set[str]) -> None:
    if len(kinds) > 1 or kinds & {"csv", "tsv"}:
        found = "tables (.csv, .tsv)" if len(kinds) == 1 else f"files of several formats ({', '.join(sorted(kinds))})"
        advice = f"write files: {folder}/**/*.SUFFIX instead, which reads every row as it stands"
        raise UnreadableFileError(f"has {found}; {advice}")


def _check_file(path: Path) -> None:
    try:
        refuse_disguise(path, format_of(path), is_given=False)
    except UnreadableFileError as error:
        raise UnreadableFileError(f"has {path}: {error}") from None


def _check_card(folder: Path, subset: str | None) -> None:
    """Refuse a README.md whose front matter names files outside of the folder."""
    card = folder / "README.md"
    if not card.is_file() or not re.search(r"data_(files|dir):", card.read_text(encoding="utf-8", errors="replace")):
        return
    import datasets

    builder = datasets.load_dataset_builder(str(folder), subset)
    for path in itertools.chain.from_iterable((builder.config.data_files or {}).values()):
        if not Path(path).resolve().is_relative_to(folder.resolve()):
            raise UnreadableFileError(f"has a README.md that names {path}, which is outside of the folder")
