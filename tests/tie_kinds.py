"""One tie of every kind, and naive dense answers for them."""

import torch
from torch import Tensor

from bayestie import Tie

TIES = {
    "exchangeable": Tie.exchangeable(4),
    "exchangeable-1": Tie.exchangeable(1),
    "complete": Tie.complete(5),
    "complete-1": Tie.complete(1),
    "one-edge": Tie.complete(2, scaled=True),
    "chain": Tie.chain(6),
    "anchored": Tie.chain(4, anchored=True),
    "ring-odd": Tie.ring(5),
    "ring-even": Tie.ring(6),
    "ring-2": Tie.ring(2),
    "grid": Tie.grid(2, 3),
    "grid-3d": Tie.grid(2, 1, 3, scaled=True),
    "forest": Tie.tree([-1, 0, 0, 1, -1]),
    "weighted": Tie.edges(5, [(0, 3), (3, 1), (1, 0), (2, 4)], [0.5, 1.0, 2.0, 0.3], scaled=True),
    "no-edge": Tie.edges(3, []),
    "groups": Tie.groups("abcabaa"),
    "groups-complete": Tie.groups("abcabaa", Tie.complete),
    "groups-ring": Tie.groups("abababaab", Tie.ring, scaled=True),
    "mixed": Tie.disjoint(
        Tie.chain(3), Tie.exchangeable(2), Tie.chain(3, anchored=True, scaled=True), Tie.ring(4), Tie.chain(3)
    ),
}


def laplacian(tie: Tie) -> Tensor:
    """Dense L over copies and hubs, (K + c, K + c)."""
    size = tie.num_copies + tie.num_components
    dense = torch.zeros(size, size, dtype=torch.float64)
    i, j = tie.edge_index
    dense[i, j] = dense[j, i] = -tie.edge_weights
    dense.diagonal().copy_(-dense.sum(0))
    return dense


def component_copies(tie: Tie) -> list[Tensor]:
    return [(tie.labels == number).nonzero()[:, 0] for number in range(tie.num_components)]


def dense_inverse(tie: Tie) -> Tensor:
    """Covariance (K, K) of the deviations from the level at sigma = 1, form `level`."""
    whole, dense = laplacian(tie), torch.zeros(tie.num_copies, tie.num_copies, dtype=torch.float64)
    for part, copies in zip(tie.components, component_copies(tie), strict=True):
        own = whole[copies[:, None], copies]
        if part.hub:
            inverse = torch.linalg.inv(own)
        elif part.anchored:
            inverse = torch.zeros_like(own)
            inverse[1:, 1:] = torch.linalg.inv(own[1:, 1:])
        else:
            inverse = torch.linalg.pinv(own)
        dense[copies[:, None], copies] = inverse
    return dense


def dense_covariance(tie: Tie, sigma: float, scale: float | Tensor, form: str) -> Tensor:
    """Prior covariance (K, K) of the copies from the definitions; a base scale, or one per component."""
    scales = torch.as_tensor(scale, dtype=torch.float64).expand(tie.num_components)
    whole = torch.zeros(tie.num_copies, tie.num_copies, dtype=torch.float64)
    deviations, dense = dense_inverse(tie), laplacian(tie)
    for part, copies, s in zip(tie.components, component_copies(tie), scales, strict=True):
        num = len(copies)
        shared, eye = torch.ones(num, num, dtype=torch.float64), torch.eye(num, dtype=torch.float64)
        block = (copies[:, None], copies)
        if form == "level":
            own = s**2 * shared + sigma**2 * deviations[block]
        elif part.hub:
            variance = 1 / (1 / sigma**2 + 1 / s**2)
            own = (s**2 - variance) * shared + variance * eye
        else:
            # Each copy ~ N(m0, s) times the edge factors ...
            own = torch.linalg.inv(dense[block] / sigma**2 + eye / s**2)
            if form == "matched":
                # ... and the mean's variance raised until the trace is K s^2.
                own = own + (num * s**2 - own.trace()) * shared / num
        whole[block] = own
    return whole
