"""Folders that the library ``datasets`` reads: what it would read wrong is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from moe_gpt.data.compressed import UnreadableFileError, format_suffix
from moe_gpt.data.disguises import FORMATS, format_of, refuse_disguise
from moe_gpt.files.inside import inside, read_json

_ABOUT = re.compile(r"(?i)(readme|licen[cs]e|notice|citation|changelog|contributing)\.(txt|md)")
_KINDS = FORMATS | {".txt": "txt", ".text": "txt", ".md": "md"}


def saved_split(folder: Path, split: str) -> Path | None:
    """Return the folder of a split that ``save_to_disk`` wrote, after checking its files; None where it wrote none.

    Raises:
        UnreadableFileError, InputError: saying what is missing, damaged or outside of the folder.
    """
    index = next((name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()), None)
    if index is None:
        return None
    names = [split] if index == "dataset_dict.json" else []
    try:
        values = read_json(folder, index)
        there = values["splits"] if names else [values["_split"] or "train"]
        if split not in there:
            raise UnreadableFileError(f"has no split={split!r}; set split to one of: {', '.join(there)}")
        part = inside(folder, *names, "state.json").parent
        for file in ({"filename": "dataset_info.json"}, *read_json(part, "state.json")["_data_files"]):
            inside(folder, *names, file["filename"]).stat()
    except (OSError, KeyError, TypeError) as error:
        raise UnreadableFileError(f"is not whole: {error}; copy or write the whole folder again") from None
    return part


def check_folder(folder: Path, subset: str | None) -> None:
    """Compare a local dataset with what ``datasets`` can read as it stands.

    Its reader of tables takes the first cells for names of rows where lines have one cell more than the header. Of
    several formats it reads one. A card in the folder may name files elsewhere.

    Raises:
        UnreadableFileError, InputError: with what is wrong, and what would be right.
    """
    found = [path for path in folder.rglob("*") if path.name[0] != "."]
    for path in filter(Path.is_symlink, found):
        inside(folder, *path.relative_to(folder).parts)
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
