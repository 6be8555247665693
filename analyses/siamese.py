"""Gradients: that of a shared parameter is the sum over its uses, for branches, time steps and places.

Run: python -m analyses.siamese [--seed 0] [--smoke] [--out out/siamese.html]
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from models.siamese import BRANCH, data, siamese


def scores(arguments: dict[str, Any], sigma: float, seed: int) -> tuple[float, Tensor]:
    """Largest gap between the levels' scores and the sums of the copies', and the scores of each copy."""
    torch.set_default_dtype(torch.float64)
    try:
        pyro.set_rng_seed(seed)
        first: Any = poutine.trace(siamese).get_trace(**arguments, sigma=sigma).nodes
        names = [name for name in first if name.endswith("_level")]
        levels = {name: first[name]["value"].detach().requires_grad_() for name in names}
        held = {name: first[name]["value"] for name in first if name.endswith(("_z", "offset"))}
        conditioned: Any = poutine.condition(siamese, data={**held, **levels})
        nodes: Any = poutine.trace(conditioned).get_trace(**arguments, sigma=sigma).nodes
    finally:
        torch.set_default_dtype(torch.float32)
    likelihood = nodes["same"]["fn"].log_prob(arguments["same"]).sum()
    copies = [nodes[name.removesuffix("_level")]["value"] for name in names]
    of_levels = torch.autograd.grad(likelihood, list(levels.values()), retain_graph=True)
    of_copies = torch.autograd.grad(likelihood, copies)
    gaps = [(one - many.sum(0)).abs().max() for one, many in zip(of_levels, of_copies, strict=True)]
    return float(torch.stack(gaps).max()), torch.cat([g.flatten(1) for g in of_copies], 1)


def shared_gap(
    module: nn.Module, num_uses: int, loss: Callable[[Sequence[Callable[..., Tensor]]], Tensor]
) -> float:
    """Largest gap between PyTorch's gradient of a shared module and the sum over copies of it."""
    own = torch.autograd.grad(loss([module] * num_uses), list(module.parameters()))
    names = [name for name, _ in module.named_parameters()]
    many = [
        {name: x.detach().clone().requires_grad_() for name, x in module.named_parameters()}
        for _ in range(num_uses)
    ]
    value = loss([bt.nn.bind(module, one) for one in many])
    each = torch.autograd.grad(value, [one[name] for one in many for name in names])
    totals = [torch.stack(each[i :: len(names)]).sum(0) for i in range(len(names))]
    return max(float((a - b).abs().max()) for a, b in zip(own, totals, strict=True))


def main(argv: Sequence[str] | None = None) -> Claim:
    """Compare scores along the path, and gradients of PyTorch's own shared modules."""
    options = read_options(__doc__, "siamese.html", argv)
    labelled = data(options.seed)
    arguments = {name: labelled[name] for name in ("left", "right", "same")}
    strengths = (0.0, 0.3, 1.0, 3.0)
    findings, sizes = [], []
    for sigma in strengths:
        gap, each = scores(arguments, sigma, options.seed)
        sizes.append(each.norm(dim=1).numpy())
        findings.append(
            Finding(f"branches, sigma = {sigma:g}: score of the level less the copies' sum", 0.0, gap)
        )
    generator = torch.Generator().manual_seed(options.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    images, steps, pairs = normal(4, 1, 5, 6), normal(7, 3), normal(2, 20, 8)

    def over_places(kernels: Sequence[Callable[..., Tensor]]) -> Tensor:
        patches = images.unfold(2, 3, 1).unfold(3, 3, 1).flatten(2, 3).unbind(2)  # 3 x 3 at 12 places
        return torch.stack([f(p) for f, p in zip(kernels, patches, strict=True)]).tanh().square().sum()

    def over_time(cells: Sequence[Callable[..., Tensor]]) -> Tensor:
        state = steps.new_zeros(4)
        for cell, x in zip(cells, steps, strict=True):
            state = cell(x, state)
        return state.square().sum()

    def over_branches(branches: Sequence[Callable[..., Tensor]]) -> Tensor:
        return (branches[0](pairs[0]) - branches[1](pairs[1])).square().sum()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        cell, conv = nn.RNNCell(3, 4).double(), nn.Conv2d(1, 2, 3).double()
        branch = nn.Sequential(*(type(m)(8, 1) if isinstance(m, nn.Linear) else m for m in BRANCH)).double()
    for name, gap in (
        ("two branches", shared_gap(branch, 2, over_branches)),
        ("a cell over 7 time steps", shared_gap(cell, 7, over_time)),
        ("a kernel over 12 places", shared_gap(conv, 12, over_places)),
    ):
        findings.append(Finding(f"PyTorch's gradient of {name} less the sum over uses", 0.0, gap))
    alike = float(np.abs(sizes[0][0] - sizes[0][1]))
    findings.append(Finding("the branches' own scores at sigma = 0 differ", 1e-3, alike, kind="above"))
    curves = [
        Curve(f"{side} branch", np.array(strengths), np.array([s[k] for s in sizes]))
        for k, side in enumerate(("left", "right"))
    ]
    plot = Plot("sigma", "length of the score of each copy", curves)
    statement = "The gradient of a shared parameter is the sum of the gradients over its uses."
    if options.smoke:
        return conclude(Claim("C6", statement, findings, plot), options)
    path = bt.sweep(
        siamese, **labelled, over={"sigma": bt.strengths(0.1, 3.0, 6, hard=True)}, seed=options.seed
    )
    return conclude(Claim("C6", statement, findings, plot, [path]), options)


if __name__ == "__main__":
    main()
