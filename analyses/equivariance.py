"""Translation: one kernel for all places makes the filter of a moved image the moved filter's output.

Run: python -m analyses.equivariance [--seed 0] [--smoke] [--out out/equivariance.html]
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot, slope
from analyses._command import read_options
from models.soft_filter import data, soft_filter

SIZE, PLACES = 6, (4, 4)


def shift_errors(weight: Tensor, images: Tensor) -> Tensor:
    """f(image moved by a pixel) less f(image) moved, where both see the same pixels.

    Args:
        weight: kernels, (draws, places, 3, 3).
        images: one larger by a row and a column per draw, (draws, SIZE + 1, SIZE + 1).

    Returns:
        (draws, errors): the errors of a step down and of a step to the right.
    """

    def run(part: Tensor) -> Tensor:
        layer = torch.vmap(bt.nn.locally_connected2d)
        return layer(part[:, None, None], weight[:, :, None, None])[:, 0, 0].unflatten(-1, PLACES)

    still = run(images[:, :SIZE, :SIZE])
    down, right = run(images[:, 1:, :SIZE]), run(images[:, :SIZE, 1:])
    errors = (down[:, :-1] - still[:, 1:]).flatten(1), (right[:, :, :-1] - still[:, :, 1:]).flatten(1)
    return torch.cat(errors, 1)


def main(argv: Sequence[str] | None = None) -> Claim:
    """Errors of posterior draws under a shift by one pixel, on fresh white images."""
    options = read_options(__doc__, "equivariance.html", argv)
    strengths = np.array(bt.strengths(1e-3, 3.0, 4 if options.smoke else 10))
    path = bt.sweep(
        soft_filter,
        **data(options.seed, SIZE, num_images=10),
        over={"sigma": [0.0, *strengths]},
        seed=options.seed,
        engine="laplace",
    )
    weight = torch.as_tensor(path["posterior"].to_dataset()["kernel.weight"].values)[..., 0, 0, :, :]
    weight = weight.flatten(1, 2)  # strengths, draws, places, 3, 3
    generator = torch.Generator().manual_seed(options.seed + 1)
    images = torch.randn(weight.shape[1], SIZE + 1, SIZE + 1, generator=generator, dtype=torch.float64)
    mean_squares = torch.stack([shift_errors(w, images).square().mean(1) for w in weight]).numpy()
    mean, error = mean_squares.mean(1), mean_squares.std(1, ddof=1) / np.sqrt(mean_squares.shape[1])
    root = np.sqrt(mean)
    root_error = np.divide(error, 2 * root, out=np.zeros_like(root), where=root > 0)
    # The error at an edge of the grid is (difference of its kernels) . patch: nine white pixels.
    resistance = bt.Tie.grid(*PLACES).effective_resistances()
    unit = float((9 * resistance.mean()).sqrt())
    power, power_error = slope(
        np.log(strengths[:2]), np.log(root[1:3]), (root_error / np.maximum(root, 1e-300))[1:3]
    )
    steps = np.diff(mean_squares, axis=0)
    growth = steps.mean(1) / (steps.std(1, ddof=1) / np.sqrt(steps.shape[1]))
    findings = [
        Finding("sigma = 0: largest error", 0.0, float(np.sqrt(mean_squares[0].max())), rounding=1e-13),
        Finding("power of sigma as sigma -> 0", 1.0, power, power_error, rounding=5e-3),
        Finding(
            "rms error over sigma as sigma -> 0, sqrt(9 mean R_e)",
            unit,
            float(root[1] / strengths[0]),
            float(root_error[1] / strengths[0]),
            rounding=5e-3 * unit,
        ),
        Finding(
            "smallest growth from a strength to the next, in standard errors",
            4.0,
            float(growth.min()),
            kind="above",
        ),
    ]
    curves = [
        Curve("posterior", strengths, root[1:], root_error[1:]),
        Curve("sigma sqrt(9 mean R_e)", strengths, unit * strengths, style="--"),
    ]
    plot = Plot("sigma", "rms error under a shift by one pixel", curves, "log", "log")
    statement = (
        "One kernel for all places gives translation equivariance: the error is 0 at sigma = 0 and grows "
        "with sigma, in proportion while sigma is small."
    )
    return conclude(Claim("C14", statement, findings, plot, [path]), options)


if __name__ == "__main__":
    main()
