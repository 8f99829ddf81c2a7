"""Models in folders of transformers, without its reports and progress bars."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from moe_gpt.errors import InputError
from moe_gpt.files.inside import read_json
from moe_gpt.files.mistaken import disguise

_WEIGHTS = ("*.safetensors", "*.bin")
_MOST_NAMED = 3


def open_parts(folder: Path, what: str, *names: str, unused: str = "$^") -> list[Any]:
    """Return the parts of a model in a folder, the weights in float32; nothing is fetched.

    Args:
        folder: with the model's config.json.
        what: it must be, for the error.
        names: of the classes of transformers that read the parts, such as AutoModel.
        unused: pattern of tensors that may be missing, because the caller does not use what they compute.

    Raises:
        InputError: where the folder has no such model, or not all of its tensors, naming its type and the cause.
    """
    import transformers

    check_is_model(folder)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return [_open_part(getattr(transformers, name), folder, unused) for name in names]
    except Exception as error:  # a stranger's folder: the readers raise many types
        raise refusal(folder, what, _disguised(folder) or str(error).strip() or type(error).__name__) from None


def refusal(folder: Path, what: str, cause: str) -> InputError:
    """Return the error for a folder that is not of what it must be, with the model's type and a line of the cause."""
    kind = read_json(folder, "config.json").get("model_type")
    return InputError(f"{folder} (model_type {kind}) is not loaded as {what}: {cause.partition(chr(10))[0]}")


def check_is_model(folder: Path, key: str = "") -> None:
    """Raise ``InputError``, which begins with a key of a config, for a folder that transformers did not write."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{key}{folder} is no model folder of transformers: it has no config.json")


def digest_of_folder(folder: Path, *more: str) -> str:
    """Return a digest of the weights and configs in a folder, and of files that fit more patterns."""
    digest = hashlib.sha256()
    names = ("config.json", "preprocessor_config.json", *_WEIGHTS, *more)
    for path in sorted({path for name in names for path in folder.glob(name)}):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _open_part(kind: Any, folder: Path, unused: str) -> Any:
    if not kind.__name__.startswith("AutoModel"):
        return kind.from_pretrained(folder, local_files_only=True)
    model, found = kind.from_pretrained(
        folder, local_files_only=True, dtype="float32", output_loading_info=True, ignore_mismatched_sizes=True
    )
    _require_tensors(found, unused)
    return model


def _require_tensors(found: dict[str, Any], unused: str) -> None:
    """Raise ``ValueError`` where what a reader found leaves tensors as they were drawn."""
    for problem, keys in (
        ("lacks", sorted(key for key in found["missing_keys"] if not re.search(unused, key))),
        ("has in other shapes", sorted(key for key, *_ in found["mismatched_keys"])),
    ):
        if keys:
            more = f" and {len(keys) - _MOST_NAMED:,} more" * (len(keys) > _MOST_NAMED)
            raise ValueError(f"it {problem} the tensors {', '.join(keys[:_MOST_NAMED])}{more}")


def _disguised(folder: Path) -> str:
    """Name a file of weights that is something else, such as a Git LFS pointer; empty where none is."""
    found = {path.name: disguise(path) for path in sorted(folder.glob(_WEIGHTS[0]))}
    return next((f"{name}: {text}" for name, text in found.items() if text), "")
