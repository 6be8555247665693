"""Layers as matrices, and the subspace of doubly block Toeplitz matrices, the convolutions."""

import torch
from jaxtyping import Float
from torch import Tensor


def convolution_matrix(
    weight: Float[Tensor, "*batch places kh kw"], size: tuple[int, int]
) -> Float[Tensor, "*batch places pixels"]:
    """The matrix of a locally connected layer of one channel: stride 1, no padding, places row-major.

    Args:
        weight: a kernel per place, (..., places, kh, kw).
        size: height and width of the input.

    Returns:
        (..., places, height * width); row p holds kernel p at its place, zeros elsewhere.
    """
    height, width = size
    kh, kw = weight.shape[-2:]
    rows, columns = height - kh + 1, width - kw + 1
    out = torch.arange(rows)[:, None, None, None] + torch.arange(kh)[:, None]
    pixel = out * width + torch.arange(columns)[:, None, None] + torch.arange(kw)
    matrix = weight.new_zeros(*weight.shape[:-2], height * width)
    index = pixel.reshape(rows * columns, kh * kw).to(weight.device)
    return matrix.scatter(-1, index.expand(*weight.shape[:-2], kh * kw), weight.flatten(-2))


def nearest_toeplitz(
    matrix: Float[Tensor, "*batch places pixels"],
    places: tuple[int, int],
    pixels: tuple[int, int],
) -> Float[Tensor, "*batch places pixels"]:
    r"""Orthogonal projection onto the doubly block Toeplitz matrices: the closest convolution.

    M is doubly block Toeplitz where M[(a, b), (c, d)] depends on (c - a, d - b) alone; the projection
    averages over entries of equal offset. The norm of what is left measures how far M is from one.

    Args:
        matrix: (..., places, pixels), both row-major.
        places: rows and columns of the output.
        pixels: height and width of the input.
    """
    (rows, columns), (height, width) = places, pixels
    down = torch.arange(height)[None, :] - torch.arange(rows)[:, None] + rows - 1
    right = torch.arange(width)[None, :] - torch.arange(columns)[:, None] + columns - 1
    num_right = width + columns - 1
    offset = down[:, None, :, None] * num_right + right[None, :, None, :]
    index = offset.reshape(-1).to(matrix.device)
    flat = matrix.flatten(-2)
    num_offsets = (height + rows - 1) * num_right
    total = flat.new_zeros(*flat.shape[:-1], num_offsets).index_add(-1, index, flat)
    count = torch.bincount(index, minlength=num_offsets)
    return (total / count)[..., index].reshape(matrix.shape)
