"""Trajectories on the CPU, compiled: what `Trajectories` does in some fifty operations, in one pass.

A lane of a tick touches a dozen vectors; torch's operations over all lanes read and write several times as
many and cost microseconds each whatever the width. The kernels release the interpreter lock.
"""

import numpy as np
import torch
from torch import Tensor

from bayestie._engines import _kernels
from bayestie._engines._trajectories import Trajectories


class NativeTrajectories(Trajectories):
    """The same state machine, lane by lane in machine code."""

    def _name_columns(self) -> None:
        super()._name_columns()
        names = ("last", "drawn", "sub", "ends", "sums", "checkpoints", "numbers", "counts", "forward")
        self._state = tuple(getattr(self, name).numpy() for name in names)
        lanes, dim = len(self.counts), self.dim
        self._z, self._half = self.last.new_empty(lanes, dim), self.last.new_empty(lanes, dim)
        self._done = np.empty(lanes, dtype=np.bool_)

    def start(self, rows: Tensor, momentum: Tensor, uniform: Tensor, step: Tensor) -> None:
        last, drawn, _, ends, sums, _, numbers, counts, forward = self._state
        moving = (last, drawn, ends, sums, numbers, counts, forward)
        _kernels.start(*moving, rows.numpy(), momentum.numpy(), uniform.numpy(), step.numpy())

    def propose(self) -> tuple[Tensor, Tensor]:
        _, _, _, ends, _, _, numbers, _, forward = self._state
        self._z, self._half = torch.empty_like(self._z), torch.empty_like(self._half)
        _kernels.propose(ends, numbers, forward, self._z.numpy(), self._half.numpy())
        return self._z, self._half

    def advance(self, z: Tensor, half: Tensor, values: Tensor, grad: Tensor, uniforms: Tensor) -> Tensor:
        leaf = [x.contiguous().numpy() for x in (z, half, values, grad, uniforms)]
        _kernels.advance(*(*self._state, self.diverging.numpy(), self._done, self.max_depth, *leaf))
        return torch.from_numpy(np.flatnonzero(self._done))

    def record(
        self, rows: Tensor, lane: Tensor, count: Tensor, z: Tensor, statistics: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept, rate = torch.empty(len(rows), dtype=torch.bool), self.last.new_empty(len(rows))
        last, *_, numbers, counts, _ = self._state
        trajectory = (last, numbers, counts, self.diverging.numpy())
        _kernels.record(*trajectory, *(x.numpy() for x in (rows, lane, count, z, statistics, kept, rate)))
        return kept, rate
