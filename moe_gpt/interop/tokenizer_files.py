"""The tokenizer, and the template of conversations, in a folder for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_gpt.config import ModelConfig
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.files.durable import write_file
from moe_gpt.interop.foreign_tokenizer import check_vocabulary

PADDINGS = ("<|pad|>", "<|padding|>")
"""Names of the token of padding."""


class Chat(NamedTuple):
    """How a model that chats is written, for programs that read its folder."""

    template: str
    """The Jinja template of a conversation."""
    training_template: str
    """The same with the tag ``generation``, which gives the mask of the answers. Some programs cannot read it."""
    turn_end: str
    """The token that ends an answer."""


def token_ids(config: ModelConfig, tokenizer: Tokenizer | None, keep_template: bool) -> dict[str, int | None]:
    """Return the tokens that start and end a text; end-of-text also starts it if the template has no start."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    check_vocabulary("", tokenizer, config.vocab_size or tokenizer.vocab_size)
    start = tokenizer.template()[0] if keep_template else []
    return {"bos_token_id": [*start, tokenizer.end_of_text_id][0], "eos_token_id": tokenizer.end_of_text_id}


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], keep_template: bool, chat: Chat | None
) -> None:
    """Write the tokenizer as a class that old and new versions of transformers know."""
    values = json.loads(tokenizer.to_json())
    if not keep_template and any(tokenizer.template()):
        values["post_processor"] = None
    write_json(folder / "tokenizer.json", values)
    special, pad = tokenizer.special_tokens(), padding_id(tokenizer)
    values = _tokenizer_config(tokenizer, settings, tokenizer.spell(pad))
    ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id")} | {"pad_token_id": pad}
    if chat:
        values |= {"eos_token": chat.turn_end, "chat_template": chat.template}
        ids["eos_token_id"] = [special[chat.turn_end], tokenizer.end_of_text_id]
        write_file(folder / "chat_template.jinja", [chat.template.encode()])
        write_file(folder / "chat_template_training.jinja", [chat.training_template.encode()])
    write_json(folder / "tokenizer_config.json", values)
    write_json(folder / "generation_config.json", ids)


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the token of padding, end-of-text where there is no other."""
    special = tokenizer.special_tokens()
    return next((special[token] for token in PADDINGS if token in special), tokenizer.end_of_text_id)


def _tokenizer_config(tokenizer: Tokenizer, settings: dict[str, Any], pad: str) -> dict[str, Any]:
    special = {"special": True, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.spell(settings["bos_token_id"]),
        "eos_token": tokenizer.end_of_text,
        "pad_token": pad,
        "unk_token": None,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": settings["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): {**special, "content": t} for t, i in tokenizer.special_tokens().items()},
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping as indented JSON."""
    write_file(path, [json.dumps(values, indent=2, ensure_ascii=False).encode("utf-8"), b"\n"])
