"""Transformers: what do one matrix for both embeddings and one block for every depth do to the score?

Run: python -m analyses.transformer_tying [--seed 0] [--smoke] [--out out/transformer_tying.html]
"""

from collections.abc import Sequence
from math import inf, log
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from analyses._mean_field import MeanFieldLanes, double_precision
from models.transformer_tying import SYMBOLS, Transformer, cut, letters, log_bilinear, transformer_tying

CONTEXT, WIDTH, DEPTH = 8, 4, 2
RING = 12  # symbols of the texts made by a walk on a ring


def transformer(shared: bool = False) -> Transformer:
    """The net, tied the way PyTorch does or not at all."""
    return Transformer(len(SYMBOLS), CONTEXT, WIDTH, DEPTH, shared).requires_grad_(False)


def prior_draw(sigma: float, text: Tensor, net: Transformer) -> tuple[dict[str, Tensor], Tensor]:
    """The net's parameters by name, and the log probabilities that the model makes of them."""
    keywords = {"sigma_embedding": sigma, "sigma_depth": sigma}
    nodes: Any = poutine.trace(transformer_tying).get_trace(text, net, **keywords).nodes
    embed, head = nodes["embedding"]["value"]
    values = {"embed.weight": embed, "head.weight": head}
    values |= {name: nodes[f"net.{name}"]["value"] for name in ("place.weight", "head.bias")}
    for name, _ in net.blocks[0].named_parameters():
        copies = nodes[f"block.{name}"]["value"]
        values |= {f"blocks.{depth}.{name}": x for depth, x in enumerate(copies)}
    return values, nodes["next"]["fn"].logits


def counts_and_gap(text: Tensor) -> tuple[int, int, float]:
    """Distinct numbers in a draw of all parameters, at both ends; output at 0 less PyTorch's shared net's."""
    net, shared = transformer(), transformer(shared=True)
    hard, logits = prior_draw(0.0, text, net)
    free, _ = prior_draw(inf, text, net)
    shared.load_state_dict(hard)
    gap = (logits - torch.distributions.Categorical(logits=shared(text[..., :-1])).logits).abs().max()
    count = [torch.cat([x.flatten() for x in values.values()]).unique().numel() for values in (hard, free)]
    return count[0], count[1], float(gap)


def mean_and_error(scores: Tensor) -> tuple[float, float]:
    """Mean over (texts, symbols) with the larger of two errors: between texts, and between windows."""
    in_windows = scores.unflatten(-1, (-1, CONTEXT)).mean(-1).flatten()  # neighbouring symbols are alike
    error = max(float(x.std()) / len(x) ** 0.5 for x in (scores.mean(-1), in_windows))
    return float(scores.mean()), error


def letter_scores(ends: Sequence[float], smoke: bool, seed: int) -> tuple[Tensor, tuple[int, int, float]]:
    """Scores of letters not seen (texts, embedding strengths, depth strengths, symbols); `counts_and_gap`."""
    num_texts, num_train, num_test, num_steps = (2, 304, 304, 50) if smoke else (5, 400, 368, 600)
    symbols = letters().roll(-997 * seed)[: num_texts * (num_train + num_test)]
    parts = symbols.view(num_texts, -1).split([num_train, num_test], 1)
    # One symbol more before the first to be scored.
    train, test = parts[0], torch.cat([parts[0][:, -1:], parts[1]], 1)
    grid = torch.cartesian_prod(torch.tensor(ends), torch.tensor(ends))
    strengths = {"sigma_embedding": grid[:, 0], "sigma_depth": grid[:, 1]}
    train, test = (torch.stack([cut(text, CONTEXT) for text in part]) for part in (train, test))
    lanes = MeanFieldLanes(transformer_tying, transformer(), strengths, train)
    lanes.fit(num_steps, 0.03)
    score, _ = lanes.score(test, 16 if smoke else 64)
    return score.unflatten(1, (len(ends), len(ends))), counts_and_gap(train[0])


def ring_scores(ends: Sequence[float], smoke: bool) -> tuple[Tensor, Tensor]:
    """Scores with no block between the embeddings, (texts, strengths, symbols).

    Returns:
        Of the average over draws, on texts that stay or step to either side; the mean over draws, on texts
        that run round the ring.
    """
    num_texts, num_train, num_test = (16 if smoke else 48), 60, 120
    choice = torch.randint(4, (num_texts, num_train + num_test + 1))
    walk = (choice == 0).long() - (choice == 1).long()
    symbols = torch.cat([walk, torch.ones_like(walk)]).cumsum(1)[:, None] % RING
    net = nn.Sequential(nn.Embedding(RING, WIDTH), nn.Linear(WIDTH, RING)).requires_grad_(False)
    strengths = {"sigma_embedding": torch.tensor(ends)}
    lanes = MeanFieldLanes(log_bilinear, net, strengths, symbols[..., : num_train + 1])
    lanes.fit(120 if smoke else 600, 0.05)
    average, each = lanes.score(symbols[..., num_train:], 16 if smoke else 64)
    return average[:num_texts], each[num_texts:]


def main(argv: Sequence[str] | None = None) -> Claim:
    """Fit letters at every pair of strengths, score letters not seen; then texts whose truth is known."""
    options = read_options(__doc__, "transformer_tying.html", argv)
    ends = [0.0, inf] if options.smoke else [0.0, 0.3, 1.0, inf]
    with double_precision(options.seed):
        score, (num_hard, num_free, gap) = letter_scores(ends, options.smoke, options.seed)
        walk, ring = ring_scores(ends, options.smoke)
    shared, unshared = (sum(x.numel() for x in transformer(kind).parameters()) for kind in (True, False))
    matrix, block = score[:, -1, -1] - score[:, 0, -1], score[:, -1, -1] - score[:, -1, 0]
    lost = [mean_and_error(walk[:, 0] - walk[:, -1]), mean_and_error(matrix), mean_and_error(matrix - block)]
    bound, free = float(ring[:, 0].mean(-1).max()), mean_and_error(ring[:, -1])
    findings = [
        Finding("parameters at sigma = 0: as many as PyTorch's shared net has", shared, num_hard),
        Finding("parameters without ties: as many as PyTorch's net has", unshared, num_free),
        Finding("output at sigma = 0 less that of PyTorch's shared net", 0.0, gap, rounding=1e-13),
        Finding("stay or step aside: score of one matrix less that of two", 0.0, *lost[0], kind="above"),
        Finding("round a ring: score of one matrix, best text", -log(2), bound, kind="below"),
        Finding("round a ring: score of two matrices", -log(2), *free, kind="above"),
    ]
    if not options.smoke:  # two short texts cannot tell
        findings += [
            Finding("letters: score lost by one matrix for both embeddings", 0.0, *lost[1], kind="above"),
            Finding("letters: and how much less is lost by one block", 0.0, *lost[2], kind="above"),
        ]
    axis = [10.0 if x == inf else x for x in ends]

    def curve(label: str, scores: Sequence[Tensor]) -> Curve:
        # Less the score without ties, text by text.
        found = [mean_and_error(x - score[:, -1, -1]) for x in scores]
        return Curve(label, axis, [mean for mean, _ in found], [error for _, error in found])

    curves = [
        curve("embeddings, blocks free", [score[:, i, -1] for i in range(len(ends))]),
        curve("blocks, embeddings free", [score[:, -1, i] for i in range(len(ends))]),
        curve("both", [score[:, i, i] for i in range(len(ends))]),
    ]
    for i, sigma_embedding in enumerate(ends):
        for j, sigma_depth in enumerate(ends):
            mean, error = mean_and_error(score[:, i, j])
            print(
                f"embeddings {sigma_embedding:g}, depth {sigma_depth:g}: {mean:.4f} ± {error:.4f} per letter"
            )
    y_label = "log score per letter, less that without ties"
    plot = Plot("sigma (10: none)", y_label, curves, x_scale="symlog")
    statement = (
        "Transformers tie embeddings and layers; two ties swept together. One block for all depths costs "
        "letters little. One matrix for both embeddings pays where what a symbol predicts is what predicts "
        "it: with no block between, its logits are symmetric, right for a walk that stays or steps to either "
        "side, and blind to direction: round a ring no weights score above -log 2 per symbol. Letters have "
        "a direction too (q, then u): a net this small, with 27 symbols, loses score."
    )
    return conclude(Claim("C15", statement, findings, plot), options)


if __name__ == "__main__":
    main()
