"""Mean-field guides of one Pyro model at many strengths and on many texts, as lanes of one optimiser."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor


@contextmanager
def double_precision(seed: int):
    """float64 by default and random numbers of our own inside; everything as it was afterwards."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class MeanFieldLanes:
    """q(u) = Normal(loc, exp(log_scale)^2) for every text and strength, fitted by Adam.

    Strengths start from the same position and see the same noise, so that their differences are not chance.

    Args:
        model: of (text, net, **strengths), all its latent sites on the real line, observed site `next`.
        net: its second argument.
        strengths: by keyword, shape (points,).
        train: shape (texts, windows, places).
    """

    def __init__(
        self, model: Callable[..., None], net: torch.nn.Module, strengths: Mapping[str, Tensor], train: Tensor
    ):
        self.model, self.net, self.names = model, net, list(strengths)
        self.num_texts, self.num_points = len(train), len(next(iter(strengths.values())))
        self.strengths = [x.repeat(self.num_texts) for x in strengths.values()]
        trace: Any = poutine.trace(model).get_trace(
            train[0], net, **{name: x[0] for name, x in strengths.items()}
        )
        trace = poutine.util.prune_subsample_sites(trace)
        self.shapes = {name: trace.nodes[name]["value"].shape for name in trace.stochastic_nodes}
        self.num_latent = sum(shape.numel() for shape in self.shapes.values())
        self.train = self._spread(train)
        self.loc = self._spread(0.3 * torch.randn(self.num_texts, self.num_latent)).requires_grad_()
        self.log_scale = torch.full_like(self.loc, -3.0).requires_grad_()

    def _spread(self, x: Tensor) -> Tensor:
        """(texts, ...) -> (texts * points, ...)."""
        return x.repeat_interleave(self.num_points, 0)

    def _draw(self) -> Tensor:
        noise = self._spread(torch.randn(self.num_texts, self.num_latent))
        return self.loc + self.log_scale.exp() * noise

    def _run(self, result: Callable[[Any], Tensor], text: Tensor) -> Tensor:
        """What `result` makes of the model's trace at a draw of each guide."""

        def one(latent: Tensor, text: Tensor, *strengths: Tensor) -> Tensor:
            parts = latent.split([shape.numel() for shape in self.shapes.values()])
            values = {n: x.view(shape) for (n, shape), x in zip(self.shapes.items(), parts, strict=True)}
            held: Any = poutine.condition(self.model, data=values)
            keywords = dict(zip(self.names, strengths, strict=True))
            return result(poutine.trace(held).get_trace(text, self.net, **keywords))

        return torch.vmap(one)(self._draw(), text, *self.strengths)

    def fit(self, num_steps: int, rate: float) -> None:
        """Maximise every lane's ELBO, the rate falling to a twentieth."""
        optimizer = torch.optim.Adam([self.loc, self.log_scale], lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, num_steps)
        for _ in range(num_steps):
            optimizer.zero_grad()
            log_joint = self._run(lambda trace: trace.log_prob_sum(), self.train)
            (-log_joint.sum() - self.log_scale.sum()).backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def score(self, text: Tensor, num_draws: int = 32) -> tuple[Tensor, Tensor]:
        """Log probability of text not seen, (texts, points, symbols): of the draws' average, and its mean."""
        target = self._spread(text)

        def log_prob(trace: Any) -> Tensor:
            site = trace.nodes["next"]
            return site["fn"].log_prob(site["value"])

        drawn = torch.stack([self._run(log_prob, target) for _ in range(num_draws)])
        average = drawn.logsumexp(0) - torch.tensor(float(num_draws)).log()
        together, each = (x.reshape(self.num_texts, self.num_points, -1) for x in (average, drawn.mean(0)))
        return together, each
