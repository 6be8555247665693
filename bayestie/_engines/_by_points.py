"""Proposals that are worked out a few points at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from bayestie._workers import run_all

_TOGETHER = 1 << 18  # numbers proposed at once


class ByPoints(ABC):
    """A proposal whose temporaries are many times its draws: split over its points, which are independent."""

    @abstractmethod
    def take(self, index: Tensor) -> Self:
        """The proposal at the points in ``index``."""

    @abstractmethod
    def _propose(self, noise: Tensor) -> tuple[Tensor, ...]:
        """`propose` at all points at once."""

    @abstractmethod
    def _log_density(self, position: Tensor) -> Tensor:
        """`log_density` at all points at once."""

    def propose(self, noise: Tensor) -> tuple[Tensor, ...]:
        """As `Proposal.propose`."""
        parts = self._parts(lambda part, n: part._propose(n), noise)
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def log_density(self, position: Tensor) -> Tensor:
        """Log density (P, batch) at positions (P, batch, D)."""
        return torch.cat(self._parts(lambda part, x: part._log_density(x), position))

    def _parts(self, method: Callable[[Self, Tensor], Any], argument: Tensor) -> list[Any]:
        together = max(1, _TOGETHER // max(1, argument[0].numel()))
        rows = torch.arange(len(argument), device=argument.device).split(together)
        return run_all([partial(method, self.take(some), argument[some]) for some in rows])
