"""What Pyro's messages say: the kind of a statement, its family, its axes, its values under a mask."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor


def is_subsample(msg: Any) -> bool:
    return isinstance(msg["fn"], _Subsample)


def is_enumerated(msg: Any) -> bool:
    return msg["infer"].get("enumerate") is not None


def is_deterministic(msg: Any) -> bool:
    """pyro.deterministic, or the same thing as a pyro.infer.reparam leaves it behind."""
    fn = msg["fn"]
    left = msg["is_observed"] and getattr(fn, "_mask", None) is False and isinstance(fn.base_dist, dist.Delta)
    return bool(msg["infer"].get("_deterministic")) or left


def base_distribution(fn: Any) -> Any:
    """The distribution under Independent, Expanded and Masked wrappers."""
    while True:
        inner = getattr(fn, "base_dist", None)
        if inner is None or isinstance(fn, torch.distributions.TransformedDistribution):
            return fn
        fn = inner


def elementwise_family(fn: Any) -> type | None:
    """The class of a univariate likelihood that its constructor's tensors rebuild, else None."""
    base = base_distribution(fn)
    constraint = getattr(type(base), "arg_constraints", None)
    if base.event_shape or not isinstance(constraint, dict):
        return None
    return type(base) if any(name in base.__dict__ for name in constraint) else None


def plate_dims(msg: Any, shape: Sequence[int]) -> tuple[str | None, ...]:
    dims: list[str | None] = [None] * len(shape)
    event_dim = getattr(msg["fn"], "event_dim", 0)
    for frame in msg["cond_indep_stack"]:
        position = len(shape) - event_dim + frame.dim if frame.vectorized else -1
        if position >= 0 and shape[position] == frame.size:
            dims[position] = frame.name
    return tuple(dims)


def given_rows(msg: Any, rows: Mapping[str, Tensor]) -> bool:
    """Whether this is the statement of a plate whose rows are given, which it then takes."""
    if not is_subsample(msg) or msg["name"] not in rows:
        return False
    msg["value"], msg["done"] = rows[msg["name"]], True
    return True


def weight_of_rows(msg: Any, weight: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """A site's weight per observation at those rows of its plates that are given."""
    for frame in msg["cond_indep_stack"]:
        if frame.name in rows and frame.vectorized:
            weight = weight.index_select(frame.dim, rows[frame.name])
    return weight


def cast_outcomes(msg: Any) -> None:
    """Zeros and ones given as integers or booleans: torch scores a Bernoulli by logits for floats alone."""
    value = msg["value"]
    if isinstance(value, Tensor) and not value.is_floating_point():
        base = base_distribution(msg["fn"])
        if isinstance(base, torch.distributions.Bernoulli):
            msg["value"] = value.to((base.logits if "logits" in base.__dict__ else base.probs).dtype)


def filled(msg: Any, fill: Tensor) -> Tensor:
    mask = msg["mask"]
    return torch.where(mask.reshape(mask.shape + (1,) * msg["fn"].event_dim), msg["value"], fill)
