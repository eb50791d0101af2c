"""What the processes of one training tell each other, so that what a method remembers is alike on all of them.

Between batches the first process's buffers replace those of the others: what each adds of its own is lost there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_all(values: Tensor) -> Tensor:
    """The sum of what each of them gives."""
    if count() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def mean_over_all(values: Tensor) -> Tensor:
    """The mean of what each of them gives."""
    return sum_over_all(values) / count()


def rows_of_all(rows: Tensor) -> Tensor:
    """The rows [B, ...] of all of them, [processes * B, ...]."""
    if count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
