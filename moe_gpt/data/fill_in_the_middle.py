"""Fill-in-the-middle: documents rearranged so that a model learns to insert (Bavarian et al., arXiv 2207.14255).

Two positions, drawn uniformly from the document's characters, cut it into prefix, middle and suffix. The parts are
written in another order with sentinels between them (section 3): prefix, suffix, middle (PSM), or suffix, prefix,
middle (SPM, in the form that the paper trains jointly with PSM). Nothing else in training changes.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np

from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError

PREFIX, MIDDLE, SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"


class FillInTheMiddle:
    """Rearranges a share of the documents. The text alone decides which ones, and where they are cut.

    Args:
        rate: share of documents that are rearranged.
        spm_rate: share of the rearranged documents in the SPM form.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, spm_rate: float) -> None:
        ids = tokenizer.special_tokens()
        missing = [token for token in (PREFIX, MIDDLE, SUFFIX) if token not in ids]
        if missing:
            raise InputError(
                f"fim_rate needs the special tokens {', '.join(missing)}, which the tokenizer lacks; add them to "
                "data.tokenizer.special_tokens"
            )
        self._tokenizer, self._ids, self._rate, self._spm_rate = tokenizer, ids, rate, spm_rate

    def __call__(self, text: str) -> np.ndarray | None:
        """Return the ids of the rearranged document, or None if it stays as it is.

        PSM is <PRE> prefix <SUF> suffix <MID> middle; SPM is <PRE> <SUF> suffix <MID> prefix middle.
        """
        rng = random.Random(hashlib.sha256(b"fill in the middle" + text.encode("utf-8")).digest())
        if rng.random() >= self._rate:
            return None
        first, second = sorted(rng.randint(0, len(text)) for _ in range(2))
        prefix, middle, suffix = self._tokenizer.encode_arrays([text[:first], text[first:second], text[second:]])
        pre, mid, suf = (self._ids[token] for token in (PREFIX, MIDDLE, SUFFIX))
        if rng.random() < self._spm_rate:
            return np.concatenate([[pre, suf], suffix, [mid], prefix, middle]).astype(np.uint32)
        return np.concatenate([[pre], prefix, [suf], suffix, [mid], middle]).astype(np.uint32)
