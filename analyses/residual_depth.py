"""Depth: residual blocks that share their parameters are one map, iterated, with fixed points where f = 0.

Run: python -m analyses.residual_depth [--seed 0] [--smoke] [--out out/residual_depth.html]
"""

from collections.abc import Sequence
from math import log

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from models.residual_depth import FIXED_POINT, A, Residual, block, data, residual_depth


def iterate(module: Residual, x: Tensor, num: int) -> Tensor:
    """x, h(x), h(h(x)), ...: (num + 1, d)."""
    states = [x]
    for _ in range(num):
        states.append(module(states[-1]))
    return torch.stack(states)


def spectral_radius(module: Residual, x: Tensor) -> float:
    """Of the Jacobian of h at x."""
    jacobian = torch.as_tensor(torch.autograd.functional.jacobian(module, x))
    return float(torch.linalg.eigvals(jacobian).abs().max())


def main(argv: Sequence[str] | None = None) -> Claim:
    """Iterate the true map, then infer it from what three blocks make of their inputs."""
    options = read_options(__doc__, "residual_depth.html", argv)
    true, start = block(), torch.tensor([2.0, 1.0], dtype=torch.float64)
    states = iterate(true, start, 400)
    limit = states[-1]
    radius = spectral_radius(true, limit)
    errors = (states - torch.tensor(FIXED_POINT, dtype=torch.float64)).norm(dim=1)
    rate = float((errors[40].log() - errors[20].log()) / 20)
    zero = torch.zeros((), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        copies = bt.nn.tied_modules("b", true, bt.Tie.chain(5), 0.0, dist.Normal(zero, 1.0))
    shared = Residual(2).double().requires_grad_(False)
    shared.load_state_dict({name: x[0] for name, x in copies.parameters.items()})
    steep = block()
    steep.linear.weight.mul_(6.0)
    steep.linear.bias.mul_(6.0)
    point = torch.tensor(FIXED_POINT, dtype=torch.float64)
    away = iterate(steep, point + 1e-6, 12)
    findings = [
        Finding(
            "five blocks at sigma = 0 less the iterated map",
            0.0,
            float((copies.iterate(start) - iterate(shared, start, 5)[-1]).abs().max()),
        ),
        Finding("f at the limit of the iteration", 0.0, float((true(limit) - limit).abs().max())),
        Finding("distance of the limit to the root of f", 0.0, float((limit - point).norm())),
        # From step 20 on tanh is its tangent but for 1e-9.
        Finding(
            "log convergence rate: that of the Jacobian's spectral radius", log(radius), rate, rounding=1e-6
        ),
        Finding("spectral radius", 1 + max(np.linalg.eigvalsh(np.array(A))), radius),
        Finding("f six times steeper: spectral radius", 1.0, spectral_radius(steep, point), kind="above"),
        Finding(
            "f six times steeper: error after 12 steps over that at the start, log",
            1.0,
            float((away[-1] - point).norm().log() - (away[0] - point).norm().log()),
            kind="above",
        ),
    ]
    over = {"sigma": bt.strengths(0.01, 0.1, 2 if options.smoke else 8, hard=True)}
    path = bt.sweep(
        residual_depth, **data(options.seed), over=over, seed=options.seed, engine="laplace", target_ess=100
    )
    posterior = path["posterior"].to_dataset()
    weight = torch.as_tensor(posterior["block.linear.weight"].values)
    bias = torch.as_tensor(posterior["block.linear.bias"].values)
    fixed = -torch.linalg.solve(weight, bias)  # strengths, chains, draws, blocks, 2
    hard = fixed[0, :, :, 0].flatten(0, 1)
    for axis, name in enumerate("xy"):
        findings.append(
            # The error is the posterior's own sd: the data are one simulation.
            Finding(
                f"posterior at sigma = 0: fixed point, {name}",
                FIXED_POINT[axis],
                float(hard[:, axis].mean()),
                float(hard[:, axis].std()),
            )
        )
    radii = torch.linalg.eigvals(torch.eye(2).double() + weight[0, :, :, 0]).abs().amax(-1)
    findings.append(
        Finding("posterior at sigma = 0: spectral radius", radius, float(radii.mean()), float(radii.std()))
    )
    # Medians: a block whose A is nearly singular has its root of f far away.
    apart = (fixed.amax(-2) - fixed.amin(-2)).norm(dim=-1).flatten(1).median(1).values.numpy()
    findings += [
        Finding("sigma = 0: distance between the blocks' fixed points", 0.0, float(apart[0])),
        Finding(
            "largest sigma: distance between the blocks' fixed points", 0.05, float(apart[-1]), kind="above"
        ),
    ]
    plot = Plot(
        "sigma",
        "median distance between the blocks' fixed points",
        [Curve("posterior", np.asarray(over["sigma"]), apart)],
        x_scale="symlog",
    )
    statement = (
        "A residual net with one block at every depth is that block iterated: its fixed points solve "
        "f(x) = 0, and the spectral radius of its Jacobian is the rate of convergence, where it is below 1."
    )
    return conclude(Claim("C4", statement, findings, plot, [path]), options)


if __name__ == "__main__":
    main()
