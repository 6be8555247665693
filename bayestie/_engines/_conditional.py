"""Exact draws where a posterior is Gaussian given one unknown noise standard deviation.

u = (h, x): with the noise's log sd h held, x is Gaussian of precision P + lambda G, lambda = exp(-2 rate h),
P the prior's and G the data's. In the eigenvectors of G relative to P everything is a scalar at any h: the
marginal posterior of h is known pointwise, is put on a fine grid and drawn from, and x follows from its
conditional. The same decomposition as in Bates and DebRoy (2004) for mixed models, and the way of INLA (Rue,
Martino and Chopin 2009) with a Gaussian likelihood; the importance weights check the grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayestie._affine import AffineDensity
from bayestie._engines._axes import AxisProposal, fine_edges, piecewise
from bayestie._engines._by_points import ByPoints
from bayestie._engines._protocol import Task

_GRID = 41  # values of h tried at once while its mode is looked for
_ZOOMS = 6
_WIDEST = 8.0  # how far from the joint mode that of the marginal may be


@dataclass
class ConditionalProposal(ByPoints):
    """h from its marginal, the others from their Gaussian given h.

    Shapes: centre (P, D - 1), to_latent and to_noise (P, D - 1, D - 1) inverse to one another, log_det (P,)
    of the former, eigenvalues and pull (P, D - 1).
    """

    column: int
    rate: float
    hyper: AxisProposal
    centre: Tensor
    to_latent: Tensor
    to_noise: Tensor
    log_det: Tensor
    eigenvalues: Tensor
    pull: Tensor

    @property
    def num_noise(self) -> int:
        return self.centre.shape[1] + 1

    def take(self, index: Tensor) -> "ConditionalProposal":
        names = ("centre", "to_latent", "to_noise", "log_det", "eigenvalues", "pull")
        kept = (getattr(self, name)[index] for name in names)
        return ConditionalProposal(self.column, self.rate, self.hyper.take(index), *kept)

    def _propose(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        here, others = noise[..., :1], noise[..., 1:]
        h, log_density = self.hyper.propose(here)
        mean, sd = self._moments(h)
        x = self.centre.unsqueeze(1) + torch.bmm(mean + sd * others, self.to_latent.mT)
        j = self.column
        return torch.cat([x[..., :j], h, x[..., j:]], -1), log_density + self._given_noise(others, sd)

    def _log_density(self, position: Tensor) -> Tensor:
        j = self.column
        h, x = position[..., j : j + 1], torch.cat([position[..., :j], position[..., j + 1 :]], -1)
        mean, sd = self._moments(h)
        noise = (torch.bmm(x - self.centre.unsqueeze(1), self.to_noise.mT) - mean) / sd
        return self.hyper.log_density(h) + self._given_noise(noise, sd)

    def _moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Means and sds of the coordinates given h (P, batch, 1), (P, batch, D - 1)."""
        precision = torch.exp(-2.0 * self.rate * h)
        variance = 1.0 / (1.0 + precision * self.eigenvalues.unsqueeze(1))
        return precision * self.pull.unsqueeze(1) * variance, variance.sqrt()

    def _given_noise(self, noise: Tensor, sd: Tensor) -> Tensor:
        constant = 0.5 * noise.shape[-1] * math.log(2.0 * math.pi)
        return -(0.5 * noise.square() + sd.log()).sum(-1) - constant - self.log_det.unsqueeze(1)


def conditional_proposal(task: Task, points: Tensor, mode: Tensor) -> ConditionalProposal | None:
    """The proposal at ``points`` with their joint modes (P, D); None where the model is not of this kind."""
    density = task.density
    if not isinstance(density, AffineDensity) or density.families:
        return None
    if density.latent_scale is None or density.quadratic is None:
        return None
    scale, quadratic = density.latent_scale.take(points), density.quadratic.take(points)
    j = scale.column
    keep = torch.tensor([i for i in range(density.num_latent) if i != j], device=points.device)
    prior = -quadratic.curvature[:, keep][:, :, keep]
    data = 0.5 * scale.squares.curvature[:, keep][:, :, keep]
    # Written about the joint mode, where sums of squares are near their least.
    centre = mode[:, keep]
    squares, slope = (x.squeeze(1) for x in scale.squares.value_and_grad(mode.unsqueeze(1)))
    _, pull = (x.squeeze(1) for x in quadratic.value_and_grad(mode.unsqueeze(1)))
    factor, info = torch.linalg.cholesky_ex(prior)
    if bool((info != 0).any()):
        return None
    # Whitened by the prior, then turned to the eigenvectors of what the data add.
    half = torch.linalg.solve_triangular(factor, data, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    eigenvalues, vectors = torch.linalg.eigh(0.5 * (whitened + whitened.mT))
    eigenvalues = eigenvalues.clamp(min=0.0)
    to_noise = vectors.mT @ factor.mT
    to_latent = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
    from_data = -0.5 * (to_latent.mT @ slope[:, keep].unsqueeze(-1)).squeeze(-1)
    from_prior = (to_latent.mT @ pull[:, keep].unsqueeze(-1)).squeeze(-1)

    def marginal(h: Tensor) -> Tensor:
        """Log joint of h and the data at (P, n), but for a constant."""
        precision = scale.precision(h)
        spread = 1.0 + precision.unsqueeze(-1) * eigenvalues.unsqueeze(1)
        pulled = precision.unsqueeze(-1) * from_data.unsqueeze(1) + from_prior.unsqueeze(1)
        gain = 0.5 * (pulled.square() / spread - spread.log()).sum(-1)
        count = scale.count.unsqueeze(1) * scale.rate * h
        return scale.log_prior(h) - count - 0.5 * precision * squares.unsqueeze(1) + gain

    hyper = _on_grid(marginal, mode[:, j])
    shift = from_prior  # the prior's pull at the centre, given as a shift of the centre
    return ConditionalProposal(
        j, scale.rate, hyper, centre + torch.bmm(to_latent, shift.unsqueeze(-1)).squeeze(-1),
        to_latent, to_noise, -factor.diagonal(dim1=1, dim2=2).log().sum(1), eigenvalues,
        from_data - eigenvalues * shift,
    )  # fmt: skip


def _on_grid(marginal: Callable[[Tensor], Tensor], start: Tensor) -> AxisProposal:
    """A one-dimensional density, known pointwise but for its constant, from near its mode at (P,)."""
    mode, width = start, _WIDEST
    offsets = torch.linspace(-1.0, 1.0, _GRID).to(start)
    for _ in range(_ZOOMS):
        tried = mode.unsqueeze(1) + width * offsets
        best = marginal(tried).nan_to_num(nan=-torch.inf).argmax(1, keepdim=True)
        mode, width = tried.gather(1, best).squeeze(1), width / 8.0
    step = 1e-3
    low, top, high = marginal(mode.unsqueeze(1) + step * torch.tensor([-1.0, 0.0, 1.0]).to(start)).unbind(1)
    curvature = (2.0 * top - low - high) / step**2
    sd = torch.where(curvature > 0, curvature, 1.0).rsqrt()
    edges = fine_edges().to(start)
    height = marginal(mode.unsqueeze(1) + sd.unsqueeze(1) * edges)
    return piecewise(mode.unsqueeze(1), sd.view(-1, 1, 1), sd.log(), edges, height.unsqueeze(1))
