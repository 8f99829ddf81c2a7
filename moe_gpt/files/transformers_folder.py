"""Models in folders of transformers, without its reports and progress bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_gpt.errors import InputError
from moe_gpt.files.inside import read_json


def open_parts(folder: Path, what: str, *names: str) -> list[Any]:
    """Return the parts of a model in a folder; nothing is fetched.

    Args:
        folder: with the model's config.json.
        what: it must be, for the error.
        names: of the classes of transformers that read the parts, such as AutoModel.

    Raises:
        InputError: where the folder has no such model, naming its type and the cause.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder of transformers: it has no config.json")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return [getattr(transformers, name).from_pretrained(folder, local_files_only=True) for name in names]
    except (OSError, ValueError, KeyError) as error:
        kind, cause = read_json(folder, "config.json").get("model_type"), str(error).strip().partition("\n")[0]
        raise InputError(f"{folder} (model_type {kind}) is not loaded as {what}: {cause}") from None
