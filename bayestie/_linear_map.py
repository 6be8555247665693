"""eta = A u + b and A^T W A at many points at once: dense, or sparse where most of A is zero."""

import warnings

import torch
from torch import Tensor


class LinearMap:
    """eta = A u + b for the points at hand, sparse where most of A is zero (indices, one-hot designs).

    Predictors are (P, M, batch), the layout in which a sparse product writes them.
    """

    def __init__(self, matrix: Tensor, offset: Tensor):
        self.offset = offset.unsqueeze(-1) if bool((offset != 0).any()) else None  # (P, M, 1)
        self.shape = matrix.shape  # (P, M, D)
        density = float((matrix != 0).sum()) / max(1, matrix.numel())
        self.dense = matrix if density > 0.2 or matrix.numel() < 100_000 else None
        if self.dense is None:
            # One block-diagonal matrix over the points: one product serves all of them.
            point, row, column = torch.nonzero(matrix, as_tuple=True)
            num_points, rows, columns = matrix.shape
            values = matrix[point, row, column]
            left, right = point * rows + row, point * columns + column
            self.sparse = _csr(left, right, values, (num_points * rows, num_points * columns))
            self.transposed = _csr(right, left, values, (num_points * columns, num_points * rows))

    def forward(self, position: Tensor, out: Tensor | None = None) -> Tensor:
        """(P, batch, D) -> (P, M, batch), into ``out`` where there is one."""
        out = self.product(position, out)
        return out if self.offset is None else out.add_(self.offset)

    def product(self, position: Tensor, out: Tensor | None = None) -> Tensor:
        """`forward` without the offset."""
        if out is None:
            out = position.new_empty(*self.shape[:2], position.shape[1])
        if self.dense is not None:
            torch.bmm(self.dense, position.mT, out=out)
        else:
            columns = position.mT.reshape(-1, position.shape[1])
            flat = out.view(-1, out.shape[-1])
            # Three times as fast as the operator @, which fills a matrix with zeros and adds to it.
            torch.addmm(flat, self.sparse, columns, beta=0.0, out=flat)
        return out

    def backward(self, slope: Tensor) -> Tensor:
        """(P, M, batch) -> (P, batch, D), the transposed map."""
        if self.dense is not None:
            return torch.bmm(slope.mT, self.dense)
        columns = self.transposed @ slope.reshape(-1, slope.shape[-1])
        return columns.view(self.shape[0], self.shape[2], -1).mT


class Gram:
    """A^T W A of diagonal W at some of the points of A (S, M, D).

    Where rows of A hold few entries (indices, one-hot designs), a sum over the pairs of each row.
    """

    def __init__(self, matrix: Tensor):
        self.matrix = matrix
        dim = matrix.shape[2]
        pattern = (matrix != 0).any(0)
        count = pattern.sum(1)
        self.row: Tensor | None = None
        if 8 * int((count * count).sum()) > len(pattern) * dim * dim:
            return
        row, column = torch.nonzero(pattern, as_tuple=True)
        each = count[row]
        left = torch.repeat_interleave(torch.arange(len(row), device=row.device), each)
        begin = (count.cumsum(0) - count)[row]
        right = begin[left] + torch.arange(len(left), device=row.device) - (each.cumsum(0) - each)[left]
        lower = column[left] >= column[right]
        left, right = left[lower], right[lower]
        self.row = row[left]
        self.product = (matrix[:, self.row, column[left]] * matrix[:, self.row, column[right]]).mT
        one = torch.ones(len(left), dtype=matrix.dtype, device=matrix.device)
        place = column[left] * dim + column[right]
        self.sum = _csr(place, torch.arange(len(left), device=row.device), one, (dim * dim, len(left)))

    def __call__(self, points: Tensor, weight: Tensor) -> Tensor:
        """Weights (P, M) -> (P, D, D)."""
        if self.row is None:
            matrix = self.matrix[points]
            return torch.bmm((matrix * weight.unsqueeze(-1)).mT, matrix)
        dim = self.matrix.shape[2]
        lower = (self.sum @ (self.product[:, points] * weight.mT[self.row])).mT.reshape(-1, dim, dim)
        return lower + lower.mT - torch.diag_embed(lower.diagonal(dim1=1, dim2=2))


def _csr(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    order = torch.argsort(row * shape[1] + column)
    starts = torch.zeros(shape[0] + 1, dtype=torch.long, device=row.device)
    starts[1:] = torch.bincount(row, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        return torch.sparse_csr_tensor(starts, column[order], values[order], shape)
