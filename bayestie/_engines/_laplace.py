"""Laplace: a Gaussian at the mode, corrected axis by axis where it is not the posterior; weighted draws."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from bayestie._engines._axes import AxisProposal, axis_proposal
from bayestie._engines._conditional import ConditionalProposal, conditional_proposal
from bayestie._engines._importance import ImportancePool, needed_ess
from bayestie._engines._laplace_fit import LaplaceFit, fit_laplace
from bayestie._engines._protocol import Draws, Task

_PROBE = 64  # Gaussian draws that tell an exact Gaussian posterior from another
_FEW = 64  # draws that will do where they weigh the same, and are wanted for the evidence alone


@dataclass
class LaplaceProposal:
    """The Gaussian at points where it is exact (or nothing better is known), the corrected one elsewhere.

    ``row`` (P,) is a point's row in ``corrected``, or -1.
    """

    fit: LaplaceFit
    corrected: AxisProposal | ConditionalProposal | None
    row: Tensor

    @property
    def num_noise(self) -> int:
        return self.fit.num_noise

    def take(self, index: Tensor) -> "LaplaceProposal":
        row = self.row[index]
        kept = row >= 0
        corrected = self.corrected.take(row[kept]) if self.corrected is not None else None
        renumbered = torch.where(kept, kept.long().cumsum(0) - 1, -1)
        return LaplaceProposal(self.fit.take(index), corrected, renumbered)

    def propose(self, noise: Tensor) -> tuple[Tensor, ...]:
        """As `Proposal.propose`."""
        kept = self.row >= 0
        if self.corrected is None or not bool(kept.any()):
            return self.fit.propose(noise)
        if bool(kept.all()):
            return self.corrected.propose(noise)
        position, log_density = self.fit.propose(noise)
        position[kept], log_density[kept] = self.corrected.propose(noise[kept])[:2]
        return position, log_density

    def log_density(self, position: Tensor) -> Tensor:
        """Log density at positions (P, batch, D)."""
        kept = self.row >= 0
        if self.corrected is None or not bool(kept.any()):
            return self.fit.log_density(position)
        if bool(kept.all()):
            return self.corrected.log_density(position)
        log_density = self.fit.log_density(position)
        log_density[kept] = self.corrected.log_density(position[kept])
        return log_density


def run_laplace(
    task: Task, fit: LaplaceFit | None = None, *, max_pool: int = 16, evidence_only: bool = False
) -> tuple[Draws, LaplaceProposal]:
    """Draws at every point, certified where they can be trusted, and the proposal they came from.

    Pools of importance draws grow up to ``max_pool`` times what is stored. If draws are wanted for the
    ``evidence_only``, few are made where they weigh the same, and repeated.
    """
    begin = time.perf_counter()
    points = task.points
    task.progress({"stage": "laplace", "message": "finding modes"})
    fit = fit_laplace(task, points) if fit is None else fit
    proposal = _corrected(task, fit)
    needed = needed_ess(task)
    pool = ImportancePool(task, points, _doubts(fit), stream=103)
    pool.fill(proposal, needed, max_pool, _FEW if evidence_only else None)
    draws = pool.draws("laplace", time.perf_counter() - begin, needed)
    draws.pool = pool.first()
    task.progress(
        {"stage": "laplace", "strengths_done": sum(draws.certified), "certified": sum(draws.certified)}
    )
    return draws, proposal


def _corrected(task: Task, fit: LaplaceFit) -> LaplaceProposal:
    probe = ImportancePool(task, fit.points, _doubts(fit), stream=105)
    probe.grow(fit, torch.arange(len(fit.points), device=fit.points.device), _PROBE)
    wanted = ~probe.exact & fit.converged
    row = torch.where(wanted, wanted.long().cumsum(0) - 1, -1)
    index = torch.nonzero(wanted).squeeze(1)
    if not len(index):
        return LaplaceProposal(fit, None, row)
    corrected = conditional_proposal(task, fit.points[index])
    return LaplaceProposal(fit, corrected or axis_proposal(task, fit.take(index)), row)


def _doubts(fit: LaplaceFit) -> list[str | None]:
    doubts: list[str | None] = []
    for converged, num_modes in zip(fit.converged.tolist(), fit.num_modes.tolist(), strict=True):
        if not converged:
            doubts.append("no mode with positive curvature was found")
        else:
            doubts.append("more than one mode was found" if num_modes > 1 else None)
    return doubts
