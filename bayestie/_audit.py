"""Optimisers against shared parameters: weight decay that Adam weakens where a parameter is used often."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DecayFinding:
    """A shared parameter whose L2 decay passes through an adaptive step.

    Args:
        name: of the parameter.
        num_uses: S, how often it is used.
        factor: what multiplies the decay per step, 1 / sqrt(S), beside a parameter that is used once and
            sees the same zero-mean gradient noise per use; 1 / S where the mean gradient dominates.
    """

    name: str
    num_uses: int
    factor: float


def audit_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, uses: Mapping[str, int] | None = None
) -> list[DecayFinding]:
    r"""Warn where L2 decay inside Adam acts on shared parameters.

    The gradient of a parameter used S times is the sum over its uses, so with independent noise of variance
    v per use its second moment is S v. Adam divides the whole step by its root, the decay included:

    .. math:: \theta \leftarrow \theta - \eta\,(g + \lambda\theta) / \sqrt{\hat v}, \qquad
              \hat v \approx S v,

    so the prior that the decay stands for weakens like 1 / sqrt(S). AdamW decays by eta lambda theta,
    whatever S.

    Args:
        optimizer: any; those of Adam's family with coupled decay are looked at.
        module: names the parameters, and by its own ties (one parameter under several names) says how
            often each is used.
        uses: number of uses by parameter name, for what PyTorch cannot see: a kernel over places, a cell
            over time steps.

    Returns:
        A finding per affected parameter; empty if all is well. Each is also given as a `UserWarning`.

    Reference: Loshchilov and Hutter (2019), Decoupled weight decay regularization, section 2.
    """
    names: dict[int, str] = {}
    seen: Counter[int] = Counter()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
        seen[id(parameter)] += (uses or {}).get(name, 1)
    findings = []
    for group in optimizer.param_groups:
        if not _couples(optimizer, group):
            continue
        shared = [p for p in group["params"] if isinstance(p, Tensor) and seen[id(p)] > 1]
        findings += [DecayFinding(names[id(p)], seen[id(p)], seen[id(p)] ** -0.5) for p in shared]
    for finding in findings:
        warnings.warn(
            f"parameter '{finding.name}' is used {finding.num_uses} times and decays by L2 inside "
            f"{type(optimizer).__name__}: its decay is about {finding.factor:.2g} of that of a parameter "
            "used once. Use torch.optim.AdamW, or a prior in the model.",
            UserWarning,
            stacklevel=2,
        )
    return findings


# Second moments in the denominator, decay added to the gradient.
_ADAPTIVE = (
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)


def _couples(optimizer: torch.optim.Optimizer, group: dict) -> bool:
    decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
    return isinstance(optimizer, _ADAPTIVE) and not decoupled and group.get("weight_decay", 0) > 0
