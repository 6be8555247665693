"""What vmap refuses of torch and Pyro, or raises for all lanes, said otherwise while lanes run."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyro.distributions as dist
import pyro.ops.einsum.torch_log as torch_log
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor


def _vmappable_safe_log(x: Tensor) -> Tensor:
    # pyro.ops.special.safe_log is an old-style autograd.Function, which functorch refuses.
    return x.clamp(min=torch.finfo(x.dtype).tiny).log()


def _cholesky_or_nan(input: Tensor, *, upper: bool = False) -> Tensor:
    # One lane's matrix that is not positive definite must not raise for the others.
    factor, info = torch.linalg.cholesky_ex(input, upper=upper)
    return torch.where(info[..., None, None] == 0, factor, factor.new_full((), float("nan")))


def _ordered_logistic(
    self: Any, predictor: Tensor, cutpoints: Tensor, validate_args: bool | None = None
) -> None:
    # Pyro's constructor writes into a fresh tensor, which vmap refuses; the same numbers without writing.
    q = torch.sigmoid(cutpoints - predictor.unsqueeze(-1))
    self.predictor, self.cutpoints = predictor.expand(q.shape[:-1]), cutpoints.expand(q.shape)
    p = torch.cat([q[..., :1], q[..., 1:] - q[..., :-1], 1.0 - q[..., -1:]], -1)
    dist.Categorical.__init__(self, p, validate_args=validate_args)


def _multinomial_log_prob(self: Any, value: Tensor) -> Tensor:
    # torch's own writes zeros into logits by a mask, which vmap refuses from torch 2.14 on.
    logits, value = torch.broadcast_tensors(self.logits, value)
    logits = torch.where((value == 0) & (logits == -torch.inf), 0.0, logits)
    arrangements = torch.lgamma(value.sum(-1) + 1.0) - torch.lgamma(value + 1.0).sum(-1)
    return arrangements + (logits * value).sum(-1)


class Enumerate(EnumMessenger):
    """poutine.enum where vmap refuses ``value.data``: only the shape is wanted, which the value has."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if value is not None:
            msg["value"] = SimpleNamespace(data=value, dim=value.dim)
        try:
            super()._pyro_post_sample(msg)
        finally:
            msg["value"] = value


@contextlib.contextmanager
def every_row(found: dict[str, tuple[int, int]] | None = None) -> Iterator[None]:
    """Plates hold all their rows, or those that a handler gives them, whatever ``subsample_size`` says.

    ``found`` is told of plates that ask for fewer: plate -> (rows of a minibatch, all rows). A plate that
    is given its rows by the model (``subsample=``) keeps them.
    """
    original = SubsampleMessenger._subsample

    def subsample(
        name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *device: Any
    ) -> Any:
        if subsample_size is not None and subsample is None:
            if found is not None and subsample_size < size:
                found[name] = (int(subsample_size), int(size))
            subsample_size = None
        return original(name, size, subsample_size, subsample, *device)

    with mock.patch.object(SubsampleMessenger, "_subsample", staticmethod(subsample)):
        yield


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Lanes of any model but enumerated ones, which need `mended_enumeration` as well."""
    with (
        every_row(),
        mock.patch.object(torch.linalg, "cholesky", _cholesky_or_nan),
        mock.patch.object(dist.OrderedLogistic, "__init__", _ordered_logistic),
        mock.patch.object(torch.distributions.Multinomial, "log_prob", _multinomial_log_prob),
    ):
        yield


def mended_enumeration() -> contextlib.AbstractContextManager[Any]:
    """While the categories of enumerated sites are summed out."""
    return mock.patch.object(torch_log, "safe_log", _vmappable_safe_log)
