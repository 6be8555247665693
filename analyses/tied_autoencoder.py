"""Autoencoders: W_dec = W_enc^T makes S = W_dec W_enc symmetric, and W known up to a rotation only.

Run: python -m analyses.tied_autoencoder [--seed 0] [--smoke] [--out out/tied_autoencoder.html]
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from models.tied_autoencoder import data, tied_autoencoder


def hessians(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the Hessian of half the mean squared error at its optimum: untied, and on the slice."""
    size = x.shape[1]
    top = torch.linalg.eigh(x.T @ x).eigenvectors[:, -width:].T  # rows: the principal directions

    def untied(flat: Tensor) -> Tensor:
        encoder, decoder = flat[: width * size].view(width, size), flat[width * size :].view(width, size).T
        return 0.5 * (x - x @ encoder.T @ decoder.T).square().sum() / len(x)

    def tied(flat: Tensor) -> Tensor:
        return untied(torch.cat([flat, flat]))

    found = []
    for loss, at in ((untied, torch.cat([top.flatten(), top.flatten()])), (tied, top.flatten())):
        hessian = torch.as_tensor(torch.autograd.functional.hessian(loss, at))
        found.append(torch.linalg.eigvalsh(hessian))
    return found[0], found[1]


def flat_and_condition(eigenvalues: Tensor) -> tuple[int, float]:
    """Number of flat directions, and the condition number of the rest."""
    rest = eigenvalues[eigenvalues > 1e-9 * eigenvalues.max()]
    return len(eigenvalues) - len(rest), float(rest.max() / rest.min())


def product(posterior: xr.Dataset) -> xr.DataArray:
    """S = W_dec W_enc, over input and output."""
    encoder = posterior["W"].sel(matrix="encoder", drop=True)
    decoder = posterior["W"].sel(matrix="decoder", drop=True).rename(input="output")
    return xr.dot(decoder, encoder, dim="unit")


def first_matrix(posterior: xr.Dataset) -> xr.DataArray:
    """W_enc itself."""
    return posterior["W"].sel(matrix="encoder")


def potential(labelled: dict[str, Any], noise_sd: float = 0.5) -> Callable[[dict[str, Tensor]], Tensor]:
    """Minus the log joint of W at sigma = 0, to a constant: the model's, without its bookkeeping."""
    scatter = labelled["x"].T @ labelled["x"] / noise_sd**2
    eye = torch.eye(len(scatter), dtype=torch.float64)

    def value(values: dict[str, Tensor]) -> Tensor:
        w = values["W_level"]
        missed = eye - w.T @ w
        return 0.5 * (missed @ scatter * missed).sum() + 0.5 * w.square().sum()

    return value


def chains(labelled: dict[str, Any], num: int, seed: int) -> xr.DataTree:
    """Pyro's own NUTS at sigma = 0: four chains, started in pairs W and -W."""
    shape = tuple(len(labelled["coords"][name]) for name in ("unit", "input"))
    pyro.set_rng_seed(seed)
    starts = torch.randn(2, *shape, dtype=torch.float64)
    found = []
    for start in (starts[0], -starts[0], starts[1], -starts[1]):
        # A metric learnt from the draws would be that of the orbit, along which nothing is to be learnt.
        kernel = NUTS(potential_fn=potential(labelled), max_tree_depth=5, adapt_mass_matrix=False)
        mcmc = MCMC(kernel, num, num // 2, {"W_level": start}, disable_progbar=True)
        mcmc.run()
        found.append(mcmc.get_samples()["W_level"])
    level = torch.stack(found).numpy()
    w = xr.DataArray(np.stack([level, level], 2), dims=("chain", "draw", "matrix", "unit", "input"))
    w = w.assign_coords(matrix=["encoder", "decoder"])
    root = xr.Dataset(attrs={"swept": "[]"})
    return xr.DataTree.from_dict({"/": root, "/posterior": w.to_dataset(name="W")})


def orbit_gaps(labelled: dict[str, Any], seed: int) -> tuple[float, float]:
    """Largest change of the model's log joint when W is rotated, and spread of its sum with the potential."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.linalg.qr(torch.randn(10, 2, 2, generator=generator, dtype=torch.float64)).Q
    turned, gaps = [], []
    torch.set_default_dtype(torch.float64)
    try:
        for turn in turns:
            w = torch.randn(2, 3, generator=generator)
            pair = []
            for level in (w, turn @ w):
                known = {"W_level": level, "W_z": torch.zeros(1, 2, 3)}
                held: Any = poutine.condition(tied_autoencoder, data=known)
                trace = poutine.trace(held).get_trace(labelled["x"], labelled["net"], sigma=0.0)
                pair.append(trace.log_prob_sum())
            turned.append(pair[0] - pair[1])
            gaps.append(pair[0] + potential(labelled)({"W_level": w}))
    finally:
        torch.set_default_dtype(torch.float32)
    spread = torch.stack(gaps)
    return float(torch.stack(turned).abs().max()), float(spread.max() - spread.min())


def main(argv: Sequence[str] | None = None) -> Claim:
    """Hessians at the optimum, then chains: what converges and what cannot."""
    options = read_options(__doc__, "tied_autoencoder.html", argv)
    generator = torch.Generator().manual_seed(options.seed)
    scales = torch.tensor([3.0, 2.5, 2.0, 0.5, 0.4, 0.3], dtype=torch.float64)
    x = scales * torch.randn(400, 6, generator=generator, dtype=torch.float64)
    findings = []
    for width in (2, 3):
        (flat, condition), (flat_tied, condition_tied) = (flat_and_condition(e) for e in hessians(x, width))
        findings += [
            Finding(f"k = {width}: flat directions of the Hessian, untied", width**2, flat),
            Finding(f"k = {width}: flat directions on the slice", width * (width - 1) // 2, flat_tied),
            Finding(
                f"k = {width}: condition number of the rest, untied over slice",
                1.0,
                condition / condition_tied,
                kind="above",
            ),
        ]
    two = data(options.seed, width=2)
    turned, gap = orbit_gaps(two, options.seed)
    findings += [
        Finding("k = 2: change of the log joint when W is rotated, sigma = 0", 0.0, turned, rounding=1e-9),
        Finding("the chains' potential plus the model's log joint: spread", 0.0, gap, rounding=1e-9),
    ]
    # One hidden unit, swept: how S loses its symmetry.
    one = data(options.seed, width=1)
    over = {"sigma": [0.0, 0.3] if options.smoke else [0.0, 0.03, 0.1, 0.3, 1.0]}
    path = bt.sweep(tied_autoencoder, **one, over=over, seed=options.seed, engine="laplace", target_ess=100)
    s = product(path["posterior"].to_dataset())
    mirrored = s.rename(input="output", output="input")
    asymmetry = abs(s - mirrored).max(("input", "output")).mean(("chain", "draw")).values
    middle = (0.5 * (s + mirrored)).transpose(..., "output", "input").sel(sigma=0.0)
    lowest = float(np.linalg.eigvalsh(middle.values).min())
    findings += [
        Finding("sigma = 0: asymmetry of S", 0.0, float(asymmetry[0])),
        Finding("sigma = 0: most negative eigenvalue of S", 0.0, min(0.0, lowest)),
        Finding("largest sigma: asymmetry of S", 0.01, float(asymmetry[-1]), kind="above"),
    ]
    num = 60 if options.smoke else 2000
    walks = [chains(labelled, num, options.seed) for labelled in (one, two)]
    checks = [bt.diagnose(walk, S=product, W=first_matrix) for walk in walks]
    # R-hat of chains this short is above 1 even where they mix.
    mixed = 1.01 if num >= 1000 else 1.15
    for k, check in zip((1, 2), checks, strict=True):
        rhat = float(check["S"].to_dataset()["rhat"].max())
        findings.append(Finding(f"k = {k}: largest R-hat of S", mixed, rhat, kind="below"))
    isolated = float(checks[0]["W"].to_dataset()["rhat"].max())
    sizes = {name: float(checks[1][name].to_dataset()["ess_bulk"].min()) for name in ("S", "W")}
    # The coordinate of largest variance says where on its orbit a chain is: a sign, or an angle.
    signs, circle = (
        first_matrix(walk["posterior"].to_dataset()).isel(input=0).transpose("chain", "draw", "unit").values
        for walk in walks
    )
    crossings = int((np.diff(np.sign(signs), axis=1) != 0).sum())
    angle = np.unwrap(np.arctan2(circle[..., 1], circle[..., 0]), axis=1)
    findings += [
        Finding("k = 1: largest R-hat of W, two isolated modes", 1.4, isolated, kind="above"),
        Finding("k = 1: times that a chain crosses from one mode to the other", 0, crossings),
        Finding("k = 2: smallest ESS of W over that of S", 1.0, sizes["W"] / sizes["S"], kind="below"),
        Finding(
            "k = 2: radians of its orbit that a chain walks, least over chains",
            0.5,
            float(np.ptp(angle, axis=1).min()),
            kind="above",
        ),
    ]
    plot = Plot(
        "sigma",
        "mean largest asymmetry of S",
        [Curve("k = 1", np.asarray(over["sigma"]), asymmetry)],
        x_scale="symlog",
    )
    statement = (
        "W_dec = W_enc^T makes S = W_dec W_enc symmetric and positive semidefinite and removes flat "
        "directions of the Hessian (k^2 untied, k (k - 1) / 2 tied); S is identified, W up to rotations: "
        "two isolated modes for k = 1, a connected orbit that chains walk for k = 2."
    )
    return conclude(Claim("C9, C12", statement, findings, plot, [path]), options)


if __name__ == "__main__":
    main()
