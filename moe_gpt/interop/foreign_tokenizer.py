"""The tokenizer of a Hugging Face folder: its end-of-text, and its tokens beside those of the model."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.inside import inside, read_json
from moe_gpt.files.mistaken import disguise, unfinished_download

ANOTHER_KIND = "for other tokenizers, AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers makes one"
_REMEDY = (
    "if tokens were added after training, model.resize_token_embeddings(len(tokenizer)) of transformers and "
    "save_pretrained make room for them; otherwise the tokenizer and the weights are of different models"
)


def read_tokenizer(path: Path, end_of_text: str) -> Tokenizer:
    """Return the tokenizer in a file of a stranger, as ``Tokenizer.load`` does.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: for every other failure. The library panics on some files, which is no ``Exception`` in Python.
    """
    try:
        tokenizer = Tokenizer.load(path, end_of_text)
        tokenizer.template()
        return tokenizer
    except (InputError, OSError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{path} is not a tokenizer.json that can be used: {error!r}") from None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return a folder's tokenizer; its end-of-text is the ``eos_token`` in tokenizer_config.json.

    Special tokens that the model has no embedding for, such as an added [PAD], are left out: no text becomes them.

    Raises:
        FileNotFoundError: if there is no tokenizer.json or no tokenizer_config.json.
        InputError: if the end-of-text is missing, or the tokenizer needs more tokens than the model has.
    """
    folder = Path(folder)
    path, settings = inside(folder, "tokenizer.json"), inside(folder, "tokenizer_config.json")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json; {ANOTHER_KIND}{unfinished_download(folder)}")
    if not settings.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer_config.json, which names the token that ends a text")
    end_of_text = _end_of_text(folder)
    if found := disguise(path):
        raise InputError(f"{path} is not a tokenizer.json: {found}")
    try:
        tokenizer = read_tokenizer(path, end_of_text)
    except InputError as error:
        raise InputError(f"{error} (eos_token of {settings} is {end_of_text!r})") from None
    vocab_size = read_json(folder, "config.json").get("vocab_size")
    return _fitted(f"{folder}: ", tokenizer, vocab_size) if isinstance(vocab_size, int) else tokenizer


def _end_of_text(folder: Path) -> str:
    """Return the ``eos_token`` of tokenizer_config.json, which is text or a mapping with its content."""
    token = read_json(folder, "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        raise InputError(f"{folder / 'tokenizer_config.json'} must name an eos_token, got {token!r}")
    return token


def _fitted(where: str, tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Return a tokenizer without the added special tokens that the model has no embedding for.

    Raises:
        InputError: where a text could become such a token, starts or ends with it.
    """
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer
    needed = {tokenizer.end_of_text_id, *(token for side in tokenizer.template() for token in side)}
    if beyond := sorted(index for index in needed if index >= vocab_size):
        raise InputError(
            f"{where}texts start or end with {tokenizer.spell(beyond[0])!r}, which is token {beyond[0]}, and the model "
            f"has only vocab_size={vocab_size} tokens; {_REMEDY}"
        )
    values = json.loads(tokenizer.to_json())
    kept = [token for token in values["added_tokens"] if token["id"] < vocab_size or not token["special"]]
    text = json.dumps(values | {"added_tokens": kept})
    fitted = Tokenizer(tokenizers.Tokenizer.from_str(text), tokenizer.end_of_text)
    check_vocabulary(where, fitted, vocab_size)
    return fitted


def check_vocabulary(where: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ``InputError`` if a tokenizer has more tokens than a model."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{where}the tokenizer has {tokenizer.vocab_size} tokens, the model only vocab_size={vocab_size}; {_REMEDY}"
        )
