"""The input of one forward pass, as tensors on the device.

Knows no models and no sequences: rows, pages and tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step. The runner fills every field. All tensors are int64 and on the model's device.

    Rows are sequences: `num_decode` rows of one token first, then chunks. The tokens of a row are
    consecutive, rows follow each other, and a row's last token is the last one of its context.
    """

    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    cache_index: Tensor  # [tokens] page * page_size + offset: where the token's K and V go
    page_table: Tensor  # [rows, pages] any valid page beyond a row's own; never read there
    context_lens: Tensor  # [rows] tokens of the sequence in the cache after this step
    query_lens: list[int]  # [rows] tokens of the row in this step
    num_decode: int
    logit_index: Tensor  # [n] which of `tokens` need logits
