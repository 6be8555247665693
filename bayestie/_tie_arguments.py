"""What users give a tied site: checked, in one dtype, and aligned with the event and the batch."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from bayestie._errors import BaseError, FormError, ShapeError, StrengthError
from bayestie._ties import Tie

Form = Literal["level", "copies", "matched"]
Strength = float | Tensor
Base = float | Tensor | TorchDistributionMixin

_FORMS = ("level", "copies", "matched")


@dataclass(frozen=True)
class TieArguments:
    """The arguments of a tied site; every tensor is in `dtype` and on `device`.

    sigma: (*B, *E) or fewer dims. event_scale_tril: (*B, *E, n) or fewer, n = E[-1].
    base: a distribution, or a known level (*B, [c,] *E).
    """

    site: str
    tie: Tie
    form: Form
    event_shape: torch.Size
    sigma: Tensor
    base: TorchDistributionMixin | Tensor
    event_scale_tril: Tensor | None
    dtype: torch.dtype
    device: torch.device

    @property
    def event_dim(self) -> int:
        return len(self.event_shape)

    @property
    def level_shape(self) -> torch.Size:
        """E for one component, (c, *E) for several."""
        return _level_shape(self.tie, self.event_shape)

    @property
    def base_kernel(self) -> Any:
        """The base without Independent around it; None for a known level."""
        return None if isinstance(self.base, Tensor) else kernel(self.base)


def align(
    tie: Tie,
    sigma: Strength,
    base: Base,
    form: Form,
    event_shape: Sequence[int],
    event_scale_tril: Tensor | None,
    *,
    site: str,
    batch_shape: torch.Size | None = None,
) -> TieArguments:
    """Check and align the arguments of a tied site.

    Args:
        site: name used in errors.
        batch_shape: batch dims that plates give, where known: a strength or level of just that shape is
            then one value per batch.
    """
    target = torch.Size(event_shape)
    sigma = number_or_tensor(sigma, f"sigma of tied site '{site}'", StrengthError)
    if not isinstance(base, TorchDistributionMixin):
        base = number_or_tensor(base, f"base of tied site '{site}'", BaseError)
    _check_form(tie, base, form, event_scale_tril, site)
    _check_sigma(sigma, form, site)
    dtype, device = common_dtype(sigma, base, event_scale_tril)

    def cast(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(dtype=dtype, device=device)
        return torch.full((), value, dtype=dtype, device=device)

    if isinstance(base, TorchDistributionMixin):
        _check_base_shape(base, _level_shape(tie, target), batch_shape, site)
        aligned = base
    else:
        aligned = _aligned(cast(base), _level_shape(tie, target), batch_shape, f"base of tied site '{site}'")
    strength = _aligned(cast(sigma), target, batch_shape, f"sigma of tied site '{site}'")
    if event_scale_tril is not None:
        event_scale_tril = cast(event_scale_tril)
        _check_tril(event_scale_tril, target, batch_shape, f"event_scale_tril of tied site '{site}'")
    return TieArguments(site, tie, form, target, strength, aligned, event_scale_tril, dtype, device)


def kernel(distribution: Any) -> Any:
    """A distribution without Independent around it."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def validating() -> bool:
    """Whether values are checked: torch's and Pyro's own switch. Off where vmap runs a model."""
    return bool(torch.distributions.Distribution._validate_args)


def common_dtype(*values: Any) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the floating tensors among numbers, tensors and parameters of distributions.

    torch's defaults where there is none; an accelerator wins over the CPU.
    """
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, TorchDistributionMixin):
            inner = kernel(value)
            names = getattr(inner, "arg_constraints", {})
            held = [getattr(inner, name, None) for name in names] if isinstance(names, dict) else []
        else:
            held = [value]
        found += [tensor for tensor in held if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    if not found:
        default = torch.empty(0)
        return default.dtype, default.device
    dtype = found[0].dtype
    for tensor in found:
        dtype = torch.promote_types(dtype, tensor.dtype)
    devices = [tensor.device for tensor in found]
    return dtype, next((device for device in devices if device.type != "cpu"), devices[0])


def split_shape(shape: torch.Size, num_right: int) -> tuple[torch.Size, torch.Size]:
    """The dims left of the last `num_right`, and those."""
    cut = max(len(shape) - num_right, 0)
    return shape[:cut], shape[cut:]


def _level_shape(tie: Tie, event_shape: torch.Size) -> torch.Size:
    return event_shape if tie.num_components == 1 else torch.Size((tie.num_components, *event_shape))


def _fits(shape: Sequence[int], target: Sequence[int] | None) -> bool:
    """Whether `shape` broadcasts to `target` without enlarging it."""
    if target is None:
        return True
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(n in (1, m) for n, m in pairs)


def _aligned(value: Tensor, target: torch.Size, batch_shape: torch.Size | None, what: str) -> Tensor:
    """Dims right of the batch line up with `target`; a value of just the plates' shape is one per batch."""
    lead, tail = split_shape(value.shape, len(target))
    on_event = _fits(tail, target) and _fits(lead, batch_shape)
    on_batch = bool(batch_shape and target) and value.numel() > 1 and _fits(value.shape, batch_shape)
    if on_event and not on_batch:
        return value
    if on_batch and not on_event:
        return value.reshape(*value.shape, *(1,) * len(target))
    batch = "any batch" if batch_shape is None else f"batch {tuple(batch_shape)}"
    raise ShapeError(
        what,
        found=f"shape {tuple(value.shape)}" + (", which may be either" if on_event else ""),
        expected=f"a shape that broadcasts to {batch} + {tuple(target)}",
        fix="Add trailing dims of size 1 for one value per batch element, a leading one for one per event."
        if on_event
        else "Batch dims (plates, particles) stand left of the event dims.",
    )


def number_or_tensor(value: Any, what: str, error: type[StrengthError] | type[BaseError]) -> float | Tensor:
    if isinstance(value, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(value)
        return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    wanted = "a number or a tensor" + (
        " or a distribution of pyro.distributions" if error is BaseError else ""
    )
    raise error(what, found=f"a {type(value).__name__}", expected=wanted, fix="Write for example 1.0.")


def _check_sigma(sigma: float | Tensor, form: Form, site: str) -> None:
    """Numbers always; tensors while validation is on."""
    what = f"sigma of tied site '{site}'"
    if isinstance(sigma, Tensor):
        if not validating():
            return
        values = sigma.detach()
        wrong = values[~(values >= 0)]
        bad = wrong.flatten()[0].item() if wrong.numel() else None
        infinite = bool(values.isinf().any())
    else:
        bad = None if sigma >= 0 else sigma
        infinite = sigma == float("inf")
    if bad is not None:
        raise StrengthError(
            what, found=f"{bad}", expected="0 or more", fix="It is a scale; 0 is hard sharing."
        )
    if infinite and form == "level":
        raise StrengthError(
            what,
            found="inf with form 'level', which is improper",
            expected="a finite number",
            fix="Independent copies need form='matched' or form='copies'.",
        )


def _check_form(tie: Tie, base: Base, form: Form, event_scale_tril: Tensor | None, site: str) -> None:
    what = f"form of tied site '{site}'"
    if form not in _FORMS:
        expected = " or ".join(map(repr, _FORMS))
        raise FormError(what, found=repr(form), expected=expected, fix="Choose one of them.")
    if isinstance(base, TorchDistributionMixin) and getattr(base.support, "is_discrete", False):
        raise BaseError(
            f"base of tied site '{site}'",
            found=f"the discrete {type(kernel(base)).__name__}",
            expected="a continuous distribution",
            fix="Tie the parameters of the discrete variable instead.",
        )
    if form == "level":
        return
    if event_scale_tril is not None:
        raise FormError(
            f"event_scale_tril of tied site '{site}'",
            found=f"form '{form}'",
            expected="form 'level'",
            fix="Leave event_scale_tril out, or use form='level'.",
        )
    if not isinstance(kernel(base), torch.distributions.Normal):
        known = not isinstance(base, TorchDistributionMixin)
        raise BaseError(
            f"base of tied site '{site}'",
            found="a known level" if known else f"a {type(kernel(base)).__name__}",
            expected=f"a Normal, which form '{form}' needs for its closed form",
            fix="Use form='level', which takes any base.",
        )
    if tie.anchored:
        raise FormError(
            what,
            found=f"'{form}' with an anchored chain",
            expected="'level'",
            fix="Use Tie.chain without anchored.",
        )
    if form == "copies" and tie.has_hub:
        raise FormError(
            what,
            found="'copies' with exchangeable copies, whose hub is no copy",
            expected="'level' or 'matched'",
            fix="Use Tie.complete, which ties the copies to one another.",
        )


def _check_base_shape(
    base: TorchDistributionMixin, target: torch.Size, batch_shape: torch.Size | None, site: str
) -> None:
    lead, tail = split_shape(base.batch_shape + base.event_shape, len(target))
    event = base.event_shape
    if _fits(tail, target) and _fits(lead, batch_shape) and event == target[len(target) - len(event) :]:
        return
    raise BaseError(
        f"base of tied site '{site}'",
        found=f"batch shape {tuple(base.batch_shape)}, event shape {tuple(event)}",
        expected=f"shapes that broadcast to the level's, {tuple(target)}",
        fix="Pass event_shape= to tied, or give the base's parameters trailing dims of size 1 ([..., None]).",
    )


def _check_tril(value: Tensor, event_shape: torch.Size, batch_shape: torch.Size | None, what: str) -> None:
    if not event_shape or value.dim() < 2 or value.shape[-2:] != (event_shape[-1], event_shape[-1]):
        raise ShapeError(
            what,
            found=f"shape {tuple(value.shape)} for event shape {tuple(event_shape)}",
            expected="shape (..., n, n), n the last event dim",
            fix="Pass event_shape=(..., n).",
        )
    lead, tail = split_shape(value.shape[:-1], len(event_shape))
    if not (_fits(tail, event_shape) and _fits(lead, batch_shape)):
        raise ShapeError(
            what,
            found=f"shape {tuple(value.shape)} for event shape {tuple(event_shape)}",
            expected="batch dims (plates, particles), event dims but the last, and (n, n)",
            fix="Give dims that do not vary size 1.",
        )
    if not validating():
        return
    if not bool((value.tril() == value).all() & (value.diagonal(dim1=-2, dim2=-1) > 0).all()):
        raise ShapeError(
            what,
            found="an entry above the diagonal, or a diagonal that is not positive",
            expected="a lower-triangular matrix with a positive diagonal",
            fix="Take torch.linalg.cholesky of the covariance.",
        )
