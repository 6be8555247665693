"""Observations that say the same, counted instead of kept: surveys of few categories have many.

Two observations of a site whose predictors agree at several random positions, at every point, agree at all
positions but for a set of probability zero, where predictors are affine; if their constants agree as well,
their log densities do, and one of them with twice the scale stands for both.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bayestie._families import Family

_FEW = 2_000  # observations that cost nothing as they are
_WORTH = 0.5  # of the observations left: otherwise counting saves less than its weights cost


def count_repeats(families: Sequence[Family], predictors: Tensor) -> tuple[list[Family], Tensor]:
    """The families without repeats, and which rows of all predictors (V, rows) they keep."""
    found, kept, start = [], [], 0
    for family in families:
        size, count = family.size, len(family.names)
        own = predictors[:, start : start + size * count].reshape(-1, size)
        first, times = (
            _distinct(torch.cat([own, *family.constants.values()])) if size > _FEW else (None, None)
        )
        if first is None or times is None:
            first = torch.arange(size, device=predictors.device)
        else:
            constants = {name: x[:, first] for name, x in family.constants.items()}
            constants["<scale>"] = constants["<scale>"] * times
            family = replace(family, constants=constants, shape=torch.Size([len(first)]))
        found.append(family)
        kept += [first + start + i * size for i in range(count)]
        start += size * count
    return found, torch.cat(kept)


def _distinct(columns: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """First places of the distinct observations among (V, size), in order, and how often each is there.

    By a hash of the bits, then compared: none are taken for one another. None where most are distinct.
    """
    bits = [(x.double() + 0.0).view(torch.int64) for x in columns]  # -0 is 0
    key = torch.zeros_like(bits[0])
    for x in bits:
        key = (key ^ x) * -7046029254386353131
        key = key ^ (key >> 29)
    _, first, inverse, times = np.unique(
        key.cpu().numpy(), return_index=True, return_inverse=True, return_counts=True
    )
    if len(first) > _WORTH * len(key):
        return None, None
    order = np.argsort(first)
    own = torch.as_tensor(first[inverse], device=key.device)
    if not all(torch.equal(x[own], x) for x in bits):
        return None, None
    place = torch.as_tensor(first[order], device=key.device)
    return place, torch.as_tensor(times[order]).to(columns)
