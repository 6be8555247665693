"""Importance sampling from a fitted proposal at every point: pools, weights, certificate, evidence.

If the log weights are constant to rounding the posterior *is* the proposal and the draws are exact;
otherwise they are Pareto-smoothed importance sampling, certified by khat and the weights' effective
sample size (Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling, JMLR 25).
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bayestie._engines._protocol import Draws, Task
from bayestie._psis import good_k, psis

_CHECKED = 8  # draws of a point whose log density is reckoned twice
_ROUNDING = 1e-10
NEARLY_CONSTANT = 0.1  # range of log weights under which all draws weigh alike
ALIKE = 0.01  # and under which few of them say what all would


class Proposal(Protocol):
    """A distribution at each of P points that standard normal noise is turned into."""

    @property
    def num_noise(self) -> int:
        """Standard normals per draw."""
        ...

    def take(self, index: Tensor) -> "Proposal":
        """The proposal at the points in ``index``."""
        ...

    def propose(self, noise: Tensor) -> tuple[Tensor, ...]:
        """Noise (P, batch, num_noise) -> position (P, batch, num_latent), log density (P, batch).

        And the posterior's log joint density (P, batch), where it is at hand.
        """
        ...


def needed_ess(task: Task) -> float:
    """The weights' effective sample size that leaves ``target_ess`` after resampling to the stored rows."""
    wanted = task.num_chains * task.num_draws
    if wanted <= task.target_ess:
        return task.target_ess
    return 1.0 / max(1.0 / task.target_ess - 1.0 / wanted, 1e-9)


class ImportancePool:
    """Importance draws at every point; points may have pools of different size.

    Args:
        task: the work.
        points: the swept points served, (P,).
        doubts: per point, a reason not to trust any weights (None: there is none). A point in doubt is
            neither certified nor called exact.
        stream: key of the pool's random numbers; ``stream + 1`` is taken too.
    """

    def __init__(self, task: Task, points: Tensor, doubts: Sequence[str | None], stream: int):
        self.task, self.points, self.doubts, self.stream = task, points, list(doubts), stream
        self.wanted = task.num_chains * task.num_draws
        count, program = len(points), task.program
        number = torch.zeros((), dtype=program.dtype, device=program.device)
        self.position: list[Tensor] = [number.new_empty(0, task.density.num_latent)] * count
        self.value: list[Tensor] = [number.new_empty(0)] * count
        self.log_weight: list[Tensor] = [number.new_empty(0)] * count
        self.smoothed: list[Tensor] = [number.new_empty(0)] * count
        self.size = torch.zeros(count, dtype=torch.long, device=number.device)
        self.rounds = [0] * count
        self.trusted = torch.tensor([doubt is None for doubt in doubts], device=number.device)
        self.exact = torch.zeros(count, dtype=torch.bool, device=number.device)
        self.khat = number.new_full((count,), torch.inf)
        self.ess = torch.zeros_like(self.khat)

    def fill(self, proposal: Proposal, needed: float, max_pool: int, first: int | None = None) -> None:
        """The wanted draws, then more where they would do, up to ``max_pool`` times as many.

        Where the ``first`` few, if there is such a number, weigh the same to a hundredth, no more are made.
        """
        begun = self.wanted if first is None else min(first, self.wanted)
        self.grow(proposal, torch.arange(len(self.points), device=self.points.device), begun)
        alike = torch.stack([w.amax() - w.amin() < ALIKE for w in self.log_weight])
        going = torch.nonzero(~alike & (self.size < self.wanted)).squeeze(1)
        if len(going):
            self.grow(proposal, going, self.wanted - begun)
        limit = max_pool * self.wanted
        for _ in range(4):
            growing = ~self.exact & (self.khat < 0.8) & (self.ess < needed) & (self.size < limit)
            growing &= self.size >= self.wanted
            if not bool(growing.any()):
                break
            index = torch.nonzero(growing).squeeze(1)
            ratio = float((needed / self.ess[index]).max())
            size = int(self.size[index].min())
            extra = min(limit - size, int(size * min(max(1.3 * ratio - 1.0, 0.5), 7.0)))
            self.grow(proposal, index, extra)

    def grow(self, proposal: Proposal, index: Tensor, extra: int) -> None:
        """Add ``extra`` draws of the proposal at the points in ``index``."""
        keys = [(self.stream, int(self.points[i]), self.rounds[int(i)]) for i in index]
        noise = self.task.normals_of((extra, proposal.num_noise), keys)
        self.add(index, *proposal.take(index).propose(noise))

    def add(self, index: Tensor, position: Tensor, log_proposal: Tensor, known: Tensor | None = None) -> None:
        """Put draws (index, batch, D) of known log density into the pools and weigh these anew.

        ``known`` is the log joint density (index, batch) by the proposal's own reckoning: where it is the
        model's at the first draws of every point it is taken, elsewhere not.
        """
        value, density = known, self.task.density
        if known is not None:
            some = density.value(self.points[index], position[:, :_CHECKED])
            close = (some - known[:, :_CHECKED]).abs() <= _ROUNDING * (1.0 + some.abs())
            value = known if bool(close.all()) else None
        if value is None:
            value = density.value(self.points[index], position)
        log_weight = value - log_proposal
        log_weight = torch.where(torch.isfinite(log_weight), log_weight, -torch.inf)
        for j, i in enumerate(index.tolist()):
            self.rounds[i] += 1
            before = len(self.value[i])
            self.position[i] = torch.cat([self.position[i], position[j]]) if before else position[j]
            self.value[i] = torch.cat([self.value[i], value[j]])
            self.log_weight[i] = torch.cat([self.log_weight[i], log_weight[j]])
            self.size[i] = len(self.value[i])
        sizes = {len(self.value[i]) for i in index.tolist()}
        for size in sizes:
            same = [i for i in index.tolist() if len(self.value[i]) == size]
            self._weigh(torch.tensor(same, device=index.device))

    def _weigh(self, index: Tensor) -> None:
        log_weight = torch.stack([self.log_weight[int(i)] for i in index])
        value = torch.stack([self.value[int(i)] for i in index])
        spread = log_weight.amax(1) - log_weight.amin(1)
        rounding = 1e-10 * (1.0 + value.abs().amax(1))
        exact = (spread <= rounding) & self.trusted[index]
        usable = torch.isfinite(log_weight).any(1)
        safe = torch.where(usable.unsqueeze(1), log_weight, 0.0)
        smoothed, khat = psis(safe)
        self.exact[index] = exact
        self.khat[index] = torch.where(exact, -torch.inf, torch.where(usable, khat, torch.inf))
        self.khat[index] = torch.nan_to_num(
            self.khat[index], nan=torch.inf, posinf=torch.inf, neginf=-torch.inf
        )
        ess = torch.exp(-torch.logsumexp(2.0 * smoothed, 1))
        self.ess[index] = torch.where(exact, torch.full_like(ess, float(value.shape[1])), ess)
        for j, i in enumerate(index.tolist()):
            self.smoothed[i] = smoothed[j]

    def draws(
        self,
        engine: str,
        seconds: float,
        needed: float,
        *,
        always_resample: bool = True,
    ) -> Draws:
        """Equal-weight draws at every point; the pools' own positions are given up.

        Args:
            engine: name to record.
            seconds: spent at all points together.
            needed: effective sample size of the weights that certifies.
            always_resample: resample by the weights at points that are not certified too; otherwise
                these give the proposal's own draws.
        """
        task, count = self.task, len(self.points)
        shape = (task.num_chains, task.num_draws)
        values, proposed = [], []
        positions = self.position[0].new_empty(count, *shape, self.position[0].shape[1])
        certified, reasons, evidence, errors, ess = [], [], [], [], []
        distinct: list[float] = []
        for i in range(count):
            exact = bool(self.exact[i])
            ok, reason = self._verdict(i, exact, needed)
            plain = exact or not (ok or always_resample)
            # Of a pool that was left short, all draws are alike: they are repeated.
            row = torch.arange(self.wanted, device=self.size.device) if plain else self._resample(i)
            row = row % len(self.value[i])
            # A draw that stands c times among N weighs c / N. The proposal's own draws are no sample of the
            # posterior: what they are worth is left to the weights.
            kish = self.wanted**2 / float(torch.bincount(row).double().square().sum())
            distinct.append(math.nan if plain and not exact else kish)
            positions[i] = self.position[i][row].reshape(positions.shape[1:])
            self.position[i] = self.position[i][:0].clone()
            values.append(self.value[i][row].reshape(shape))
            proposed.append((self.value[i] - self.log_weight[i])[row].reshape(shape))
            log_weight = self.log_weight[i]
            mean = torch.logsumexp(log_weight, 0) - math.log(len(log_weight))
            relative = torch.exp(log_weight - mean)
            evidence.append(log_weight.mean() if exact else mean)
            errors.append(mean.new_zeros(()) if exact else mean_error(relative, float(self.khat[i])))
            ess.append(self.ess[i].new_tensor(torch.inf) if exact else self.ess[i])
            certified.append(ok)
            reasons.append(reason)
        worth = torch.tensor(distinct, dtype=torch.float64)
        return Draws(
            points=self.points,
            position=positions,
            log_density=torch.stack(values),
            engine=[engine] * count,
            certified=certified,
            reason=reasons,
            exact=[bool(e) for e in self.exact],
            khat=self.khat.clone(),
            ess_weights=torch.stack(ess),
            log_evidence=torch.stack(evidence),
            log_evidence_error=torch.stack(errors),
            quality=torch.stack([worth / worth, worth, worth], 1),
            seconds=torch.full((count,), seconds / count, dtype=torch.float64),
            stats={"log_proposal": torch.stack(proposed)},
        )

    def first(self) -> dict[str, Tensor]:
        """The first proposal draws at every point as ``Draws.pool`` wants them: (P, wanted) each."""
        row = torch.arange(self.wanted, device=self.size.device)
        value = torch.stack([x[row % len(x)] for x in self.value])
        weight = torch.stack([x[row % len(x)] for x in self.log_weight])
        value, weight = (torch.where(torch.isfinite(weight), x, -1e300) for x in (value, weight))
        return {"lp": value, "laplace_log_density": value - weight}

    def _resample(self, i: int) -> Tensor:
        """Systematic resampling of the smoothed weights (one uniform), then shuffled over the chains."""
        rng = self.task.generator(self.stream + 1, int(self.points[i]))
        cumulative = torch.cumsum(torch.exp(self.smoothed[i]), 0)
        grid = (torch.arange(self.wanted, dtype=cumulative.dtype) + rng.uniform()) / self.wanted
        rows = torch.searchsorted(cumulative / cumulative[-1], grid.to(cumulative.device))
        order = torch.as_tensor(rng.permutation(self.wanted), device=rows.device)
        return rows.clamp(max=len(cumulative) - 1)[order]

    def _verdict(self, i: int, exact: bool, needed: float) -> tuple[bool, str]:
        size, khat, ess = int(self.size[i]), float(self.khat[i]), float(self.ess[i])
        doubt = self.doubts[i]
        if doubt is not None:
            return False, doubt
        if exact:
            return True, "the posterior is Gaussian to rounding: draws are exact"
        threshold = good_k(size)
        # Weights that hardly differ have no tail for khat to measure: it then fits the rounding of nothing.
        spread = float(self.log_weight[i].amax() - self.log_weight[i].amin())
        if spread < NEARLY_CONSTANT:
            return True, f"importance weights are within {math.expm1(spread):.1%} of one another"
        if khat >= threshold:
            return False, f"khat {khat:.2f} of the importance weights is not below {threshold:.2f}"
        if ess < needed:
            return False, f"the importance weights' effective sample size {ess:.0f} is below {needed:.0f}"
        return True, f"importance weights have khat {khat:.2f} and effective sample size {ess:.0f}"


def mean_error(relative: Tensor, khat: float) -> Tensor:
    """Standard error of the mean of weights with that tail.

    Above khat 1/2 their variance is infinite and the mean converges as n^(khat - 1), not as n^(-1/2) (Vehtari
    et al. 2024, section 3): the spread that was seen is too small by as much.
    """
    num = len(relative)
    heavy = min(max(khat - 0.5, 0.0), 0.5) if math.isfinite(khat) else 0.0
    return relative.std() / math.sqrt(num) * num**heavy
