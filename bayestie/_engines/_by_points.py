"""Proposals that are worked out a few points and draws at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor

from bayestie._workers import run_all

_TOGETHER = 1 << 16  # numbers proposed at once: what a core's cache holds


class ByPoints(ABC):
    """A proposal whose temporaries are many times its draws: split over its points, which are independent."""

    @abstractmethod
    def take(self, index: Tensor) -> Self:
        """The proposal at the points in ``index``."""

    @abstractmethod
    def _propose(self, noise: Tensor) -> tuple[Tensor, ...]:
        """`propose` of some draws at all points."""

    @abstractmethod
    def _log_density(self, position: Tensor) -> Tensor:
        """`log_density` of some draws at all points."""

    def propose(self, noise: Tensor) -> tuple[Tensor, ...]:
        """As `Proposal.propose`."""
        return self._in_parts(lambda part, some: part._propose(some), noise)

    def log_density(self, position: Tensor) -> Tensor:
        """Log density (P, batch) at positions (P, batch, D)."""
        return self._in_parts(lambda part, some: (part._log_density(some),), position)[0]

    def _in_parts(
        self, method: Callable[[Self, Tensor], tuple[Tensor, ...]], argument: Tensor
    ) -> tuple[Tensor, ...]:
        points, batch, dim = argument.shape
        width = max(1, min(batch, _TOGETHER // max(1, dim)))
        rows = torch.arange(points, device=argument.device).split(max(1, _TOGETHER // (width * max(1, dim))))
        first = method(self.take(rows[0]), argument[rows[0], :1])
        out = tuple(x.new_empty(points, batch, *x.shape[2:]) for x in first)

        def job(some: Tensor) -> None:
            part, here = self.take(some), slice(int(some[0]), int(some[-1]) + 1)
            for draws in (slice(i, i + width) for i in range(0, batch, width)):
                for whole, found in zip(out, method(part, argument[here, draws]), strict=True):
                    whole[here, draws] = found

        run_all([partial(job, some) for some in rows])
        return out
