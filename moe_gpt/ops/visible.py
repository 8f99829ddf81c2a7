"""Who sees whom: the one value that tells attention which keys each query may read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_gpt.ops.ragged import RowPlan


class Visible(NamedTuple):
    """Queries are the last T of S = past + T positions; each sees itself and what comes before it.

    Padding, on either side, is seen by nobody else, and documents in one sequence do not see each other.
    """

    past: int = 0
    """Positions in the key-value cache."""
    valid_mask: Bool[Tensor, "B S"] | None = None
    """False for padding; it covers the cached positions too."""
    document_ids: Int[Tensor, "B T"] | None = None
    """A number for each position, the same within a document; for whole sequences without padding or cache."""
    rows: RowPlan | None = None
    """Where the tokens belong to different rows of a cache, which tokens to which; it replaces all of the above."""
    form: Any = None
    """The mask as ``ops.prepare`` made it for the implementation in use. None where ``is_causal`` holds, and under
    ``using("plain")``, which makes the mask in every layer."""

    def is_causal(self, n_queries: int) -> bool:
        """Whether kernels need no mask: no padding, one document, and no cache or one query.

        Their causal mode takes as many keys as queries. A single query is the last position and sees all keys.
        """
        return self.valid_mask is None and self.document_ids is None and (self.past == 0 or n_queries == 1)

    def matrix(self, n_queries: int, device: torch.device) -> Bool[Tensor, "#B 1 T S"]:
        """Return the mask in full: True where the query of a row may see the key of a column."""
        n_keys = self.past + n_queries
        visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(self.past)[None, None]
        if self.document_ids is not None:
            visible = visible & (self.document_ids[:, None, :, None] == self.document_ids[:, None, None, :])
        if self.valid_mask is not None:  # padding sees itself, so that no row is empty
            itself = torch.eye(n_keys, dtype=torch.bool, device=device)[self.past :]
            visible = (visible & self.valid_mask[:, None, None, :]) | itself
        return visible

    def positions(self, n_queries: int, device: torch.device) -> Int[Tensor, "#B T"]:
        """Return each query's position: from the start of its document, or among the valid ones."""
        if self.rows is not None:
            return self.rows.positions
        if self.document_ids is not None:
            return positions_within(self.document_ids)
        if self.valid_mask is not None:
            return (self.valid_mask.long().cumsum(1) - 1).clamp(min=0)[:, self.past :]
        return torch.arange(self.past, self.past + n_queries, device=device)[None]

    @property
    def valid_queries(self) -> Bool[Tensor, "B T"] | None:
        """The part of ``valid_mask`` for the queries."""
        return None if self.valid_mask is None else self.valid_mask[:, self.past :]


def positions_within(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return how far each position is from the first of its document in the sequence."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(is_first, index, 0).cummax(dim=1).values
