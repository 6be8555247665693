"""PyTorch's recurrent cells as formulas: its own kernels have no batching rule that lanes could use."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.modules import rnn


@contextlib.contextmanager
def batchable_cells() -> Iterator[None]:
    """Inside, RNNCell, GRUCell and LSTMCell run under vmap; the same numbers but for rounding."""
    with mock.patch.multiple(
        rnn._VF,
        rnn_tanh_cell=lambda *args: _preactivation(*args).tanh(),
        rnn_relu_cell=lambda *args: _preactivation(*args).relu(),
        gru_cell=_gru,
        lstm_cell=_lstm,
    ):
        yield


def _preactivation(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    return linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)


def _gru(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    reset_x, update_x, new_x = linear(x, w_ih, b_ih).chunk(3, -1)
    reset_h, update_h, new_h = linear(h, w_hh, b_hh).chunk(3, -1)
    update = torch.sigmoid(update_x + update_h)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return new + update * (h - new)


def _lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, cell = state
    enter, forget, new, leave = _preactivation(x, h, w_ih, w_hh, b_ih, b_hh).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell
