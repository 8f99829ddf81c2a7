"""The options of speculative decoding, for commands that generate."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from moe_gpt.commands.options import Switch, Whole, flat
from moe_gpt.errors import InputError

if TYPE_CHECKING:
    from moe_gpt.api.loaded import LanguageModel
    from moe_gpt.inference.speculation import Draft

SPECULATION = Group("Speculation")


@flat
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationOptions:
    """What guesses tokens."""

    lookup: Annotated[Switch, Parameter(group=SPECULATION)] = False
    """Guess that the last tokens are followed by what followed them before: quicker for greedy text that repeats."""
    draft: Annotated[str | None, Parameter(group=SPECULATION)] = None
    """A run or folder of a smaller model with the same tokenizer, which guesses tokens."""
    guesses: Annotated[Whole | None, Parameter(group=SPECULATION)] = None
    """Tokens to guess at a time; 4 by default."""

    def describe(self) -> str:
        """Return what guesses, as the end of a sentence; nothing where nothing does."""
        by = self.draft or "lookup" * self.lookup
        return f", guesses by {by}" * bool(by)


NO_SPECULATION = SpeculationOptions()


def make_draft(options: SpeculationOptions, loaded: LanguageModel, n_rows: int) -> Draft | None:
    """Return what guesses tokens for a model, None where nothing was asked for.

    Raises:
        InputError: where both kinds were asked for, or the smaller model has another tokenizer.
    """
    from moe_gpt.api.loaded import load
    from moe_gpt.inference.speculation import DraftModel, PromptLookup

    if options.lookup and options.draft is not None:
        raise InputError(f"--lookup or --draft: give one, got both (--draft {options.draft})")
    n_guesses = options.guesses or 4
    if options.lookup:
        return PromptLookup(n_guesses)
    if options.draft is None:
        if options.guesses is not None:
            raise InputError(f"--guesses {options.guesses} needs --lookup or --draft")
        return None
    smaller = load(options.draft, str(loaded.model.embedding.weight.device), precision=loaded.precision)
    if smaller.require_tokenizer().to_json() != loaded.require_tokenizer().to_json():
        raise InputError(f"--draft {options.draft} must have the tokenizer of {loaded.path}, and has another")
    return DraftModel(smaller.model, n_guesses, n_rows, loaded.precision)
