"""One likelihood site's share of a density of affine predictors: value, slope, curvature, profiles."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayestie._families import Family, Natural


@dataclass(frozen=True)
class Part:
    """One likelihood site's share of the predictors, at some points."""

    rows: slice
    family: Family
    constants: dict[str, Tensor]
    natural: Natural | None
    weight: Tensor | None  # of the natural form, (P or 1, M, 1)

    def predictors(self, eta: Tensor) -> list[Tensor]:
        return list(eta[:, self.rows].split(self.family.size, 1))

    def value_(self, eta: Tensor) -> Tensor:
        """(P, M, batch) -> (P, batch), without the natural form's linear part; overwrites its rows of eta."""
        if self.natural is None:
            return self.family.log_density(self.constants, self.predictors(eta)).sum(1)
        if self.weight is None:
            return -self.natural.cumulant.total_(eta[:, self.rows])
        return -self._total(self.natural.cumulant.value_(eta[:, self.rows]))

    def value_and_slope_(self, eta: Tensor, work: Tensor) -> Tensor:
        """The same; its rows of eta become the derivative by the predictors, less what is constant of it."""
        own = eta[:, self.rows]
        if self.natural is not None:
            value = self._total(self.natural.cumulant.value_and_slope_(own, work[:, self.rows]))
            if self.weight is not None:
                own.mul_(self.weight)
            return -value
        with torch.enable_grad():
            leaf = own.detach().clone().requires_grad_(True)
            value = self.family.log_density(self.constants, list(leaf.split(self.family.size, 1))).sum(1)
            own.copy_(torch.autograd.grad(value.sum(), leaf)[0])
        return value.detach()

    def curvature(self, natural: Natural, eta: Tensor) -> Tensor:
        """Minus the second derivatives (P, M) of each observation by its predictor."""
        weight = natural.cumulant.curvature(eta[:, self.rows])
        return (weight if self.weight is None else weight * self.weight).squeeze(-1)

    def hessian(self, matrix: Tensor, eta: Tensor) -> Tensor:
        """Second derivatives (P, D, D) by the latents, by its rows (P, M, D) of the map."""
        total: Any = 0.0
        blocks = matrix.split(self.family.size, 1)
        with torch.enable_grad():
            predictors = [x.detach().requires_grad_(True) for x in self.predictors(eta)]
            summed = self.family.log_density(self.constants, predictors).sum()
            first = torch.autograd.grad(summed, predictors, create_graph=True)
            for left, slope in zip(blocks, first, strict=True):
                # Elementwise density: the gradient of the summed slope is one row of every observation's
                # own block of second derivatives.
                second = torch.autograd.grad(
                    slope.sum(), predictors, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for right, weight in zip(blocks, second, strict=True):
                    total = total + torch.bmm((left * weight.detach()).mT, right)
        return total

    def add_profile(
        self, points: Tensor, centre: Tensor, moved: Tensor, nodes: Tensor, elements: int, out: Tensor
    ) -> None:
        """Add its change along every axis to ``out`` (P, D, G), ``elements`` numbers at a time.

        From predictors ``centre`` (P, M), at the nodes times what an axis moves, ``moved`` (P, M, D); nodes
        (G,) or (P, D, G).
        """
        family, count = self.family, len(self.family.names)
        steps = moved.reshape(len(points), count, family.size, -1)
        here = centre.reshape(len(points), count, family.size)
        tiny = 1e-12 * steps.abs().amax((2, 3), keepdim=True)
        point, row, axis = torch.nonzero((steps.abs() > tiny).any(1), as_tuple=True)
        chunk = max(1, elements // nodes.shape[-1])
        for at in (slice(i, i + chunk) for i in range(0, len(point), chunk)):
            p, r, j = point[at], row[at], axis[at]
            base = [here[p, i, r].unsqueeze(1) for i in range(count)]
            own = nodes if nodes.dim() == 1 else nodes[p, j]
            along = [b + steps[p, i, r, j].unsqueeze(1) * own for i, b in enumerate(base)]
            if self.natural is None:
                change = family.at(points[p], r, along) - family.at(points[p], r, base)
            else:
                target, cumulant = self.natural.target, self.natural.cumulant
                size = cumulant.value(along[0]) - cumulant.value(base[0])
                if self.weight is not None:
                    size = size * self.weight[p if len(self.weight) > 1 else 0, r]
                pull = target[points[p] if len(target) > 1 else 0, r].unsqueeze(1)
                change = pull * (along[0] - base[0]) - size
            out.view(-1, nodes.shape[-1]).index_add_(0, p * out.shape[1] + j, change)

    def _total(self, size: Tensor) -> Tensor:
        if self.weight is None:
            return size.sum(1)
        return torch.matmul(self.weight.mT, size).squeeze(1)
