"""Matrices of linear maps from few products: columns that no row holds together are found as one.

Curtis, Powell and Reid (1974, On the estimation of sparse Jacobian matrices, IMA Journal of Applied
Mathematics 13): of a matrix that is zero outside a known pattern, the products with one vector per group of
such columns hold every entry.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

_WHOLE = 3  # points whose every column is found
_WORTH = 0.5  # of all products: what is gone without where fewer would do


def matrices(products: Callable[[Tensor, Tensor], Tensor], num_points: int, like: Tensor) -> Iterator[Tensor]:
    """Guesses of the matrices (P, rows, D) of one linear map per point, for the caller to check.

    The first supposes that entries are zero at all points where they are at a few; the last does not, and is
    right if the maps are linear.

    Args:
        products: vectors (L, D) and the points (L,) they are of -> the products (L, rows).
        num_points: P.
        like: a tensor (..., D) of the vectors' kind.
    """
    dim = like.shape[-1]
    eye = torch.eye(dim, dtype=like.dtype, device=like.device)

    def of(points: Tensor, vectors: Tensor) -> Tensor:
        found = products(vectors.repeat(len(points), 1), points.repeat_interleave(len(vectors)))
        return found.reshape(len(points), len(vectors), -1)

    points = torch.arange(num_points, device=like.device)
    spread = torch.linspace(0, num_points - 1, min(num_points, _WHOLE)).round().long().unique().to(points)
    whole = of(spread, eye).mT
    if len(spread) < num_points:
        groups = ColumnGroups((whole != 0).any(0))
        if groups.num < _WORTH * dim:
            yield groups.expand(of(points, groups.seeds(like)))
        whole = of(points, eye).mT
    yield whole


class ColumnGroups:
    """Columns of a matrix of known pattern (rows, D), grouped so that no row has two of a group.

    Attributes:
        num: how many groups.
    """

    def __init__(self, pattern: Tensor):
        self.shape = pattern.shape
        self.row, self.column = torch.nonzero(pattern, as_tuple=True)
        self.group = _group(pattern)
        self.num = int(self.group.max()) + 1

    def seeds(self, like: Tensor) -> Tensor:
        """The vectors to multiply with, (num, D): sums of a group's unit vectors."""
        number = torch.arange(self.num, device=like.device).unsqueeze(1)
        return (self.group == number).to(like)

    def expand(self, products: Tensor) -> Tensor:
        """Products (..., num, rows) with the seeds -> the matrices (..., rows, D)."""
        out = products.new_zeros(*products.shape[:-2], *self.shape)
        out[..., self.row, self.column] = products[..., self.group[self.column], self.row]
        return out


def _group(pattern: Tensor) -> Tensor:
    """Each column's group: the first that none of the columns it meets is in."""
    held = pattern.to(torch.float32)
    meets = ((held.mT @ held) > 0).cpu().numpy()
    group = np.full(len(meets), -1)
    for j, beside in enumerate(meets):
        taken = np.zeros(len(meets) + 1, dtype=bool)
        taken[group[beside]] = True  # those without a group yet mark the last place
        taken[-1] = False
        group[j] = int(np.argmin(taken))
    return torch.as_tensor(group, device=pattern.device)
