"""Coordinates in which a learned strength does not pull at the copies that data hold.

Copies are level + sigma z. Where data say more of a copy than the tie does, sigma z is known and z moves as
1 / sigma: a ridge that bends. There c = sigma z, up to a constant, is the better coordinate, and between the
ends one with a power of sigma: Papaspiliopoulos, Roberts and Skoeld (2007), A General Framework for the
Parametrization of Hierarchical Models, Statistical Science 22.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayestie._program import LaneProgram

LEAST = 0.2  # share of what is known of some copy that data know: below, nothing is gained


@dataclass(frozen=True)
class LearnedStrengths:
    """Which latents are multiplied by a strength that is one latent's exponential.

    Latent j stands in the model as u_j exp(rate_j u_h), h = by_j: ``rate`` (D,) is 0 of all others.
    """

    by: Tensor
    rate: Tensor


@dataclass(frozen=True)
class Centring:
    """u_j = c_j exp(-power_j (u_h - about_j)), h = by_j: of every point, power and about (P, D)."""

    by: Tensor
    power: Tensor
    about: Tensor

    def take(self, index: Tensor) -> "Centring":
        """Some of the points."""
        return Centring(self.by, self.power[index], self.about[index])

    def _shift(self, position: Tensor) -> Tensor:
        return self.power.unsqueeze(1) * (position[..., self.by] - self.about.unsqueeze(1))

    def to_latent(self, c: Tensor) -> Tensor:
        """(P, batch, D) -> u."""
        return c * torch.exp(-self._shift(c))

    def from_latent(self, u: Tensor) -> Tensor:
        """The inverse: the strengths' own latents are the same on either side."""
        return u * torch.exp(self._shift(u))

    def pull_back(self, c: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Log density (P, batch) and gradient by u (P, batch, D) -> those by c, volume included."""
        shift = self._shift(c)
        times = torch.exp(-shift)
        by_strength = -self.power.unsqueeze(1) * (grad * c * times + 1.0)
        return value - shift.sum(-1), (grad * times).index_add(-1, self.by, by_strength)

    def straightened(self, mode: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """A Gaussian of u (P, D), (P, D, D), near ``about``, in the coordinates c; its volume is the same."""
        centre = self.from_latent(mode.unsqueeze(1)).squeeze(1)
        turned = (self.power * mode).unsqueeze(-1) * factor[:, self.by]
        return centre, torch.exp(self._shift(mode.unsqueeze(1))).mT * (factor + turned)


def learned_strengths(program: LaneProgram) -> LearnedStrengths | None:
    """The latents of ties whose strength is learned, and one latent's exponential; None: there are none."""
    ties = {
        name: site.infer["bayestie"]
        for name, site in program.deterministic.items()
        if "bayestie" in site.infer and f"{name}_z" in program.latent
    }
    # In the other forms a copy's spread is no power of sigma.
    ties = {name for name, about in ties.items() if about["form"] == "level" and _is_number(about["sigma"])}
    if not ties or program.loop_reason is not None:
        return None
    dim, like = program.num_latent, torch.zeros((), dtype=program.dtype, device=program.device)

    def logs(position: Tensor) -> Tensor:
        lane = program.run_lane(position, program.point(0), without=set(program.observed), until=ties)
        sigmas = [lane.messages[name]["infer"]["bayestie"]["sigma"] for name in sorted(ties)]
        return torch.stack([sigma.to(like).reshape(()).log() for sigma in sigmas])

    eye = torch.eye(dim).to(like)
    generator = torch.Generator().manual_seed(program.seed)
    probe = torch.randn(3, dim, dtype=torch.float64, generator=generator).to(like)
    try:
        with torch.no_grad(), program.quiet():
            found = torch.vmap(logs)(torch.cat([torch.zeros_like(eye[:1]), eye, probe]))
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        return None  # what vmap cannot do: the coordinates stay as they are
    start, moved, at = found[0], found[1 : dim + 1] - found[0], found[dim + 1 :]
    by, rate = torch.zeros(dim, dtype=torch.long, device=program.device), torch.zeros(dim).to(like)
    for i, name in enumerate(sorted(ties)):
        columns = torch.nonzero(moved[:, i].abs() > _NOTHING).squeeze(1)
        if len(columns) != 1:
            continue
        h, slope = int(columns), moved[int(columns), i]
        expected = start[i] + slope * probe[:, h]
        if not bool(((at[:, i] - expected).abs() <= 1e-9 * (1.0 + expected.abs())).all()):
            continue
        here = program.latent[f"{name}_z"].slice
        by[here], rate[here] = h, slope
    rate[by[rate != 0]] = 0.0  # a strength that is a copy itself is left as it is
    return LearnedStrengths(by, rate) if bool((rate != 0).any()) else None


def centring(strengths: LearnedStrengths, position: Tensor, precision: Tensor) -> Centring | None:
    """By what data know of each copy, at positions (P, D) whose diagonal of the precision is (P, D).

    A standard normal's own precision is 1: what is beyond it the data know. None where that is little of all.
    """
    known = 1.0 - 1.0 / torch.nan_to_num(precision, nan=1.0, posinf=1e12, neginf=1.0).clamp(min=1.0)
    power = known * strengths.rate
    if not bool((known * (strengths.rate != 0) > LEAST).any()):
        return None
    return Centring(strengths.by, power, position[:, strengths.by])


def _is_number(sigma: object) -> bool:
    return isinstance(sigma, Tensor) and sigma.numel() == 1


_NOTHING = 1e-12
