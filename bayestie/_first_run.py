"""A model's validated run: its sites recorded, what cannot be served refused, and errors told by site."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from bayestie._errors import (
    BayestieError,
    DataError,
    DiscreteLatentError,
    DuplicateSiteError,
    ModelError,
    ShapeError,
    first_line,
)
from bayestie._messages import (
    base_distribution,
    cast_outcomes,
    filled,
    given_rows,
    is_deterministic,
    is_enumerated,
    is_subsample,
)


class FirstRun(Messenger):
    """The validated run: draws every latent, records every site, names the site an error is about."""

    def __init__(self, rows: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.rows = rows or {}  # of plates that shall hold some of their rows
        self.messages: dict[str, Any] = {}
        self.fills: dict[str, Tensor] = {}  # observed site with masked rows -> a value it did observe

    def _pyro_sample(self, msg: Any) -> None:
        if given_rows(msg, self.rows) or is_subsample(msg):
            return
        if msg["name"] in self.messages:
            raise DuplicateSiteError(
                f"site '{msg['name']}'",
                found="a second statement of that name",
                expected="one statement per name",
                fix="Rename one, or index it in a loop: pyro.sample(f'x_{i}', ...).",
            )
        if msg["is_observed"]:
            cast_outcomes(msg)
        if msg["is_observed"] or msg["value"] is not None:
            return
        discrete = msg["fn"].has_enumerate_support or msg["fn"].support.is_discrete
        if discrete and not is_enumerated(msg):
            raise DiscreteLatentError(
                f"site '{msg['name']}'",
                found=f"a discrete latent, {type(base_distribution(msg['fn'])).__name__}",
                expected="continuous latents, or discrete ones marked for enumeration",
                fix="Mark it with infer={'enumerate': 'parallel'}, sum it out by hand, or observe it.",
            )
        if not discrete:
            try:
                transform = biject_to(msg["fn"].support)
                # Shapes, not a sample: flat priors (ImproperUniform) have none.
                x = 0.2 * torch.randn(transform.inverse_shape(msg["fn"].shape()))
                msg["value"] = transform(x)
                msg["done"] = True
            except NotImplementedError as error:
                raise ModelError(
                    f"site '{msg['name']}'",
                    found=f"a {type(msg['fn']).__name__} without a map from the real line to its support",
                    expected="a support registered with torch.distributions.biject_to",
                    fix="Sample a standard normal and transform it with pyro.deterministic.",
                ) from error

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            return
        self.messages[msg["name"]] = msg
        if msg["is_observed"] and not is_deterministic(msg):
            if not isinstance(msg["value"], Tensor):
                raise DataError(
                    f"observed site '{msg['name']}'",
                    found=f"a {type(msg['value']).__name__}",
                    expected="a tensor",
                    fix="Pass torch.as_tensor(...) of it; of a pandas column, of its .to_numpy().",
                )
            fill = _observed_value(msg)
            if fill is not None:
                self.fills[msg["name"]] = fill
            _check_observed(msg, msg["value"] if fill is None else filled(msg, fill), sorted(self.rows))


def _observed_value(msg: Any) -> Tensor | None:
    """A value of an observed site that its mask keeps, if it drops others."""
    value, mask = msg["value"], msg["mask"]
    if not isinstance(mask, Tensor) or bool(mask.all()) or not bool(mask.any()):
        return None
    batch = value.shape[: value.dim() - msg["fn"].event_dim]
    shape = torch.broadcast_shapes(batch, mask.shape)
    first = torch.nonzero(mask.expand(shape).reshape(-1))[0]
    rows = value.expand(shape + value.shape[len(batch) :]).flatten(0, max(len(shape) - 1, 0))
    return rows[first].squeeze(0)


def _check_observed(msg: Any, scored: Tensor, minibatched: Sequence[str]) -> None:
    value, mask = msg["value"], msg["mask"]
    kept = torch.ones((), dtype=torch.bool, device=value.device) if mask is None else torch.as_tensor(mask)
    event_dim = msg["fn"].event_dim
    bad = ~torch.isfinite(value.to(torch.get_default_dtype()))
    bad = bad.flatten(bad.dim() - event_dim).any(-1) if event_dim else bad
    bad = bad & kept
    if bad.any():
        first = tuple(torch.nonzero(bad)[0].tolist()) if bad.dim() else ()
        raise DataError(
            f"observed site '{msg['name']}'",
            found=f"{int(bad.sum())} NaN or infinite of {bad.numel()} values, the first at index {first}",
            expected="finite observations",
            fix="Drop those rows, or mask them with pyro.poutine.mask or obs_mask=.",
        )
    try:
        log_density = msg["fn"].log_prob(scored)
    except ValueError as error:
        if "broadcastable" in str(error):
            shape = tuple(msg["fn"].shape())
            raise ShapeError(
                f"observed site '{msg['name']}'",
                found=f"data of shape {tuple(value.shape)} for a likelihood of shape {shape}",
                expected="one shape",
                fix="Check the data, and the number of copies of any tie they depend on."
                if not minibatched
                else f"Of minibatches of {minibatched}, give the data of the rows drawn: "
                "`with pyro.plate(...) as rows: ... obs=y[rows]`, or pyro.subsample(y, event_dim=0).",
            ) from error
        outside = "support" in str(error)
        raise (DataError if outside else ModelError)(
            f"observed site '{msg['name']}'",
            found=str(error).split("\n")[0][:300],
            expected=f"values in the support of {type(base_distribution(msg['fn'])).__name__}",
            fix="Check the data's coding, and the likelihood's family and parameters.",
        ) from error
    batch = torch.Size(log_density.shape)
    weight = torch.ones(batch)
    for frame in msg["cond_indep_stack"]:
        if frame.vectorized and len(batch) >= -frame.dim:
            weight = weight.narrow(frame.dim, 0, 1)
    if weight.numel() > 1:
        raise ModelError(
            f"observed site '{msg['name']}'",
            found=f"batch shape {tuple(batch)} with axes that no plate declares",
            expected="a pyro.plate for every batch axis (or .to_event)",
            fix=f"Wrap the statement in `with pyro.plate('row', {batch[-1]}):`, "
            "or check for an unwanted broadcast.",
        )


def explained(
    error: Exception, run: FirstRun, model: Any, arguments: Mapping[str, Any], swept: Mapping[str, Any]
) -> BayestieError:
    """What a model raised, told by its argument, its tie or the site it came to."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            return DataError(
                f"argument '{name}'",
                found=f"{int((~torch.isfinite(value)).sum())} NaN or infinite of {value.numel()} values",
                expected="finite numbers",
                fix=f"Clean or mask them; the model failed with: {first_line(error)}",
            )
    last = next(reversed(run.messages), None)
    where = "before its first site" if last is None else f"after site '{last}'"
    at = ", ".join(f"{k}={float(v):g}" for k, v in swept.items())
    tie = _tie_mismatch(error, run, arguments)
    if tie is not None:
        return tie
    return ModelError(
        f"model '{getattr(model, '__name__', type(model).__name__)}'" + (f" at {at}" if at else ""),
        found=f"{type(error).__name__} {where}: {' '.join(str(error).split())[:300]}",
        expected="a model that runs on its arguments",
        fix="Call the model by hand on the same arguments under pyro.enable_validation(True).",
    )


def _tie_mismatch(error: Exception, run: FirstRun, arguments: Mapping[str, Any]) -> BayestieError | None:
    """The error, told as a tie whose copies the data do not fit, where it looks like one."""
    text = str(error).lower()
    if not any(word in text for word in ("size", "shape", "broadcast", "out of bounds", "out of range")):
        return None
    tied = {
        name: msg["infer"]["bayestie"]["tie"].num_copies
        for name, msg in run.messages.items()
        if "bayestie" in msg["infer"]
    }
    arrays = {n: x for n, x in arguments.items() if isinstance(x, Tensor) and x.dim()}
    lengths = {n: tuple(x.shape) for n, x in arrays.items()}
    whole = [x for x in arrays.values() if not x.is_floating_point()]
    if not tied or not lengths:
        return None
    name, num_copies = next(reversed(tied.items()))
    top = max((int(x.max()) + 1 for x in whole if x.numel()), default=0)
    others = f", whose largest index is {top - 1}" if top > num_copies else ""
    return ShapeError(
        f"tied site '{name}' in a statement after site '{next(reversed(run.messages))}'",
        found=f"{num_copies} copies, data of shapes {lengths}{others}, and {type(error).__name__}: "
        + first_line(error),
        expected="copies that line up with the data, or an index into them",
        fix="Give the tie as many copies as there are units, or index them: theta[unit].",
    )
