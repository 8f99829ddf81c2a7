"""Beginnings of Python functions that one line completes: prompts whose answers a rule can judge."""

from __future__ import annotations

import ast
import functools
import random

from moe_gpt.data.builtin_corpus import parsed_modules
from moe_gpt.data.document import Document, is_held_out
from moe_gpt.data.tokenizer import Tokenizer

_LONGEST = 72
"""Characters of a prompt."""


def line_prompts(held_out: bool, validation_fraction: float) -> list[str]:
    """Return ``def name(arguments):``, a line end and ``    return`` for each function that has an argument.

    They are in a fixed random order. A held-out one is from a held-out module, and in no other one.
    """
    training, kept = _prompts(validation_fraction)
    found = sorted(kept - training if held_out else training)
    random.Random("lines").shuffle(found)
    return found


@functools.cache
def _prompts(validation_fraction: float) -> tuple[set[str], set[str]]:
    """Return the prompts of training's modules, and those of held-out ones."""
    sides: tuple[set[str], set[str]] = (set(), set())
    for module, _, tree in parsed_modules():
        side = sides[is_held_out(Document("", module), validation_fraction)]
        side.update(prompt for node in ast.walk(tree) if (prompt := _beginning(node)))
    return sides


def _beginning(node: ast.AST) -> str:
    """Return the prompt of a function; empty for anything else, and for one that is long or has no argument."""
    if not isinstance(node, ast.FunctionDef):
        return ""
    arguments = ast.unparse(node.args)
    prompt = f"def {node.name}({arguments}):\n    return"
    return prompt if arguments and len(prompt) <= _LONGEST else ""


def line_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a line: all whose text has a line end, and end-of-text."""
    ids = range(tokenizer.vocab_size)
    return frozenset([tokenizer.end_of_text_id, *(token for token in ids if "\n" in tokenizer.decode([token]))])
