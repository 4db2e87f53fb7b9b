"""How ZeRO 3 cuts parameters: each rank holds a slice of each, equally long, padded at the end.

    >>> slice_length(10, num_ranks=4)
    3
    >>> [held_range(10, rank, num_ranks=4) for rank in range(4)]
    [(0, 3), (3, 6), (6, 9), (9, 10)]
    >>> held_range(2, 3, num_ranks=4)     # a slice may be padding only
    (2, 2)

`engine/zero_slices.py` checks on each start that DeepSpeed cuts in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slice_length(num_values: int, num_ranks: int) -> int:
    """Returns the length of each rank's slice of a flattened parameter, padding included."""
    return -(-num_values // num_ranks)


def held_range(num_values: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Returns which values of a flattened parameter a rank's slice holds: start and stop."""
    length = slice_length(num_values, num_ranks)
    return min(rank * length, num_values), min((rank + 1) * length, num_values)


def cut(whole: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Returns a rank's slice of a whole tensor, with zeros as padding; a copy."""
    start, stop = held_range(whole.numel(), rank, num_ranks)
    piece = torch.zeros(slice_length(whole.numel(), num_ranks), dtype=whole.dtype)
    piece[: stop - start] = whole.reshape(-1)[start:stop]
    return piece


def fill_columns(table: Tensor, whole: Tensor, first: int) -> None:
    """Writes into row r of a table what rank r's slice of a tensor holds from position `first` on.

    Three copies whatever the number of ranks: the rows that are full, the last one that is not,
    and the padding.

    Args:
        table: Shape (num_ranks, columns), columns up to the length of a slice less `first`.
        whole: The tensor that is cut.
        first: Position in the slices.
    """
    num_ranks, columns = table.shape
    flat = whole.reshape(-1)
    length = slice_length(flat.numel(), num_ranks)
    num_full = flat.numel() // length
    table[:num_full] = flat[: num_full * length].view(num_full, length)[:, first : first + columns]
    if num_full < num_ranks:
        rest = flat[num_full * length :][first : first + columns]
        table[num_full:] = 0
        table[num_full, : rest.numel()] = rest
