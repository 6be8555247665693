"""Matrices of linear maps from few products: right where the guess is, refused and found whole where not."""

import torch
from torch import Tensor

from bayestie._compressed import ColumnGroups, matrices

POINTS, ROWS, DIM = 7, 12, 10


def maps() -> Tensor:
    """Every row holds one of eight columns and the last two: groups of one, one and eight columns."""
    generator = torch.Generator().manual_seed(2)
    out = torch.zeros(POINTS, ROWS, DIM, dtype=torch.float64)
    for row in range(ROWS):
        for column in (row % 8, 8, 9):
            out[:, row, column] = torch.randn(POINTS, generator=generator, dtype=torch.float64)
    return out


class Counted:
    """Products with the maps, and how many."""

    def __init__(self, whole: Tensor):
        self.whole, self.count = whole, 0

    def __call__(self, vectors: Tensor, points: Tensor) -> Tensor:
        self.count += len(vectors)
        return torch.einsum("lmd,ld->lm", self.whole[points], vectors)


def test_columns_that_no_row_holds_together_are_found_as_one():
    whole = maps()
    products = Counted(whole)
    first = next(matrices(products, POINTS, whole))
    assert torch.equal(first, whole)
    # Every column at three points, three groups at all.
    assert products.count == 3 * DIM + POINTS * 3
    groups = ColumnGroups((whole != 0).any(0))
    assert groups.num == 3
    assert torch.equal(groups.seeds(whole).sum(0), torch.ones(DIM).double())


def test_an_entry_that_only_other_points_have_is_found_the_second_time():
    whole = maps()
    whole[2, 0, 5] = 1.5  # neither first, middle nor last
    guesses = matrices(Counted(whole), POINTS, whole)
    assert not torch.equal(next(guesses), whole)
    assert torch.equal(next(guesses), whole)


def test_a_full_map_is_found_whole_at_once():
    whole = torch.randn(POINTS, ROWS, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    products = Counted(whole)
    assert torch.equal(next(matrices(products, POINTS, whole)), whole)
