"""Pyro model -> lane program: one pure function of a flat unconstrained vector, batched over lanes."""

import contextlib
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.ops.einsum.torch_log as torch_log
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from bayestie._errors import (
    BayestieError,
    DataError,
    DeviceError,
    DiscreteLatentError,
    DuplicateSiteError,
    KeywordError,
    ModelError,
    NoLatentError,
    ShapeError,
)


@dataclass(frozen=True)
class Site:
    """One latent, observed or deterministic statement of the model, as the validated run saw it."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[str | None, ...]  # plate name of each axis; None where no plate claims it
    is_discrete: bool
    infer: Mapping[str, Any]
    unconstrained_shape: tuple[int, ...] = ()
    start: int = 0  # where the site begins in the flat unconstrained vector

    @property
    def size(self) -> int:
        return math.prod(self.unconstrained_shape)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class LaneInputs:
    """What may differ from lane to lane beside the position; every tensor leads with the lane axis."""

    swept: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # observed site -> weight per observation
    data: Mapping[str, Tensor] = field(default_factory=dict)  # model argument -> its value

    def take(self, index: Tensor) -> "LaneInputs":
        """The inputs of the lanes in ``index``, repeated or reordered as it says."""
        return LaneInputs(*({name: x[index] for name, x in part.items()} for part in self._parts()))

    def _parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]:
        return self.swept, self.weights, self.data

    def flat(self) -> list[Tensor]:
        return [x for part in self._parts() for x in part.values()]

    def unflatten(self, tensors: Sequence[Tensor]) -> "LaneInputs":
        rest = iter(tensors)
        return LaneInputs(*({name: next(rest) for name in part} for part in self._parts()))

    def key(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(part) for part in self._parts())


@contextlib.contextmanager
def model_defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Run a model under ``dtype`` and ``device`` defaults, and restore what was there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device) if device.type != "cpu" else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random numbers from ``seed`` on, and afterwards the caller's state as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would seed every accelerator of the process, borrowed or not.
        torch.default_generator.manual_seed(seed)
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for (None is the CPU), or a named error if it is not there.

    Raises:
        DeviceError: the device is unknown, or CUDA was asked for and is absent.
    """
    try:
        resolved = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise DeviceError(
            "device",
            found=repr(device),
            expected="'cpu', 'cuda' or 'cuda:0'",
            fix="Name a device torch knows.",
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "device",
            found="'cuda' asked for, and torch sees no CUDA device",
            expected="an NVIDIA GPU with a working driver and a CUDA build of torch",
            fix="Use device='cpu', or check torch.cuda.is_available() on this machine.",
        )
    return resolved


def to_tensors(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Arrays to tensors, floats to ``dtype``, everything to ``device``; other leaves stay as they are."""

    def leaf(x: Any) -> Any:
        if isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "biuf":
            # A copy, as torch takes neither negative strides nor read-only memory; 0-d arrays stay 0-d.
            x = torch.as_tensor(np.array(x, order="C"))
        if isinstance(x, Tensor):
            x = x.detach().to(device)
            return x.to(dtype) if x.is_floating_point() else x
        return x

    return tree_map(leaf, value)


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


class _Enumerate(EnumMessenger):
    """poutine.enum where vmap refuses ``value.data``: only the shape is wanted, which the value has."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if value is not None:
            msg["value"] = SimpleNamespace(data=value, dim=value.dim)
        try:
            super()._pyro_post_sample(msg)
        finally:
            msg["value"] = value


def _is_subsample(msg: Any) -> bool:
    return isinstance(msg["fn"], _Subsample)


def _is_enumerated(msg: Any) -> bool:
    return msg["infer"].get("enumerate") is not None


def _is_deterministic(msg: Any) -> bool:
    """pyro.deterministic, or the same thing as a pyro.infer.reparam leaves it behind."""
    fn = msg["fn"]
    left = msg["is_observed"] and getattr(fn, "_mask", None) is False and isinstance(fn.base_dist, dist.Delta)
    return bool(msg["infer"].get("_deterministic")) or left


def base_distribution(fn: Any) -> Any:
    """The distribution under Independent, Expanded and Masked wrappers."""
    while True:
        inner = getattr(fn, "base_dist", None)
        if inner is None or isinstance(fn, dist.TransformedDistribution):
            return fn
        fn = inner


def _elementwise_family(fn: Any) -> type | None:
    """The class of a univariate likelihood that its constructor's tensors rebuild, else None."""
    base = base_distribution(fn)
    constraint = getattr(type(base), "arg_constraints", None)
    if base.event_shape or not isinstance(constraint, dict):
        return None
    return type(base) if any(name in base.__dict__ for name in constraint) else None


class _Enough(Exception):
    """Every site asked for has been seen: the rest of the model need not run."""


class _Lane(Messenger):
    """Gives latent sites their value from a flat vector and adds up the log joint density.

    Entered first, so that plates, scales and masks of the model have acted on a message before it is
    seen here.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        position: Tensor,
        weights: Mapping[str, Tensor],
        without: Set[str] = frozenset(),
        on_observed: Callable[[Any], None] | None = None,
        fills: Mapping[str, Tensor] | None = None,
        imputed: Mapping[str, str] | None = None,
        until: Set[str] | None = None,
    ):
        super().__init__()
        self.sites, self.position, self.weights = sites, position, weights
        self.until = until
        self.without, self.on_observed = without, on_observed
        self.fills, self.imputed = fills or {}, imputed or {}
        self.log_jacobian = position.new_zeros(())
        self.log_densities: dict[str, Tensor] = {}  # site -> elementwise, scaled and masked
        self.messages: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            _cast_outcomes(msg)
        if msg["is_observed"] or msg["done"] or _is_subsample(msg):
            return
        if _is_enumerated(msg):
            # Summed out by poutine.enum where the density is asked for; any category does elsewhere.
            msg["value"], msg["done"] = msg["fn"].enumerate_support(expand=True)[0], True
            return
        site = self.sites[msg["name"]]
        x = self.position[site.slice].reshape(site.unconstrained_shape)
        # The transform is rebuilt from the site's own support, so a support that depends on other
        # sites or on a swept keyword is right in every lane.
        transform = biject_to(msg["fn"].support)
        msg["value"] = transform(x)
        msg["done"] = True
        self.log_jacobian = self.log_jacobian + transform.log_abs_det_jacobian(x, msg["value"]).sum()

    def _pyro_post_sample(self, msg: Any) -> None:
        if _is_subsample(msg):
            return
        name = msg["name"]
        msg = self.mended(msg)
        self.messages[name] = msg
        self._score(name, msg)
        if self.until is not None and self.until <= self.messages.keys():
            raise _Enough

    def _score(self, name: str, msg: Any) -> None:
        if _is_deterministic(msg):
            return
        if self.on_observed is not None and name not in self.sites and not isinstance(msg["fn"], dist.Unit):
            self.on_observed(msg)
        if name in self.without:
            return
        weight = self.weights.get(name)
        if weight is not None:
            msg["scale"] = msg["scale"] * weight
        log_density = msg["fn"].log_prob(msg["value"])
        self.log_densities[name] = scale_and_mask(log_density, msg["scale"], msg["mask"])

    def mended(self, msg: Any) -> Any:
        """The message as it is scored, where masks need care; the model itself sees no difference.

        An observation that is masked out may be NaN: its density is dropped, but its gradient would
        stay NaN, so it is scored at a value that the site did observe. A latent that obs_mask= made for
        an observation that is there enters nothing else; scored by its prior, it integrates to one,
        where without a density it would be a flat direction.
        """
        name = msg["name"]
        if name in self.fills:
            return {**msg, "value": _filled(msg, self.fills[name])}
        if name in self.imputed:
            return {**msg, "mask": msg["mask"] | self.messages[self.imputed[name]]["mask"]}
        return msg

    def log_joint(self) -> Tensor:
        total = self.log_jacobian
        for log_density in self.log_densities.values():
            total = total + log_density.sum()
        return total


class _FirstRun(Messenger):
    """The validated run: draws every latent, records every site, names the site an error is about."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: dict[str, Any] = {}
        self.fills: dict[str, Tensor] = {}  # observed site with masked rows -> a value it did observe

    def _pyro_sample(self, msg: Any) -> None:
        if _is_subsample(msg):
            if msg["fn"].subsample_size is not None and msg["fn"].subsample_size < msg["fn"].size:
                raise ModelError(
                    f"plate '{msg['name']}'",
                    found=f"a subsample of {msg['fn'].subsample_size} of {msg['fn'].size} rows",
                    expected="all rows",
                    fix="Drop subsample_size; minibatches are an option of engine='pyro_svi'.",
                )
            return
        if msg["name"] in self.messages:
            raise DuplicateSiteError(
                f"site '{msg['name']}'",
                found="a second statement of that name",
                expected="one statement per name",
                fix="Rename one, or index it in a loop: pyro.sample(f'x_{i}', ...).",
            )
        if msg["is_observed"]:
            _cast_outcomes(msg)
        if msg["is_observed"] or msg["value"] is not None:
            return
        discrete = msg["fn"].has_enumerate_support or msg["fn"].support.is_discrete
        if discrete and not _is_enumerated(msg):
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
        if _is_subsample(msg):
            return
        self.messages[msg["name"]] = msg
        if msg["is_observed"] and not _is_deterministic(msg):
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
            _check_observed(msg, msg["value"] if fill is None else _filled(msg, fill))


def _cast_outcomes(msg: Any) -> None:
    """Zeros and ones given as integers or booleans: torch scores a Bernoulli by logits for floats alone."""
    value = msg["value"]
    if isinstance(value, Tensor) and not value.is_floating_point():
        base = base_distribution(msg["fn"])
        if isinstance(base, torch.distributions.Bernoulli):
            msg["value"] = value.to((base.logits if "logits" in base.__dict__ else base.probs).dtype)


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


def _filled(msg: Any, fill: Tensor) -> Tensor:
    mask = msg["mask"]
    return torch.where(mask.reshape(mask.shape + (1,) * msg["fn"].event_dim), msg["value"], fill)


def _check_observed(msg: Any, scored: Tensor) -> None:
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
                fix="Check the data, and the number of copies of any tie they depend on.",
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


def plate_dims(msg: Any, shape: Sequence[int]) -> tuple[str | None, ...]:
    dims: list[str | None] = [None] * len(shape)
    event_dim = getattr(msg["fn"], "event_dim", 0)
    for frame in msg["cond_indep_stack"]:
        position = len(shape) - event_dim + frame.dim if frame.vectorized else -1
        if position >= 0 and shape[position] == frame.size:
            dims[position] = frame.name
    return tuple(dims)


# Tracing a graph costs about as much as this many eager evaluations.
TRACE_AFTER = 25

RESERVED = (
    "over",
    "engine",
    "seed",
    "num_chains",
    "num_draws",
    "target_ess",
    "device",
    "dims",
    "coords",
    "keep",
    "guide",
    "progress",
    "out",
)


class LaneProgram:
    """A Pyro model as a batched pure function f(u, swept, weights, data) -> log joint density.

    ``u`` is the flat unconstrained vector of length ``num_latent``; the density includes the Jacobian of
    the maps to the constrained supports, so it is Pyro's potential with the sign turned.

    Args:
        model: the Pyro model.
        args: its positional arguments; floats are cast to ``dtype``.
        kwargs: its keyword arguments, without the swept ones.
        swept: a value, shape (num_points,), of each swept keyword at every point of the sweep.
        weights: a weight per observation, (num_points, *site shape), by observed site: its log density is
            multiplied by it. 0 leaves an observation out.
        data: arguments that differ from point to point, (num_points, *argument shape), by name.
        device: where to run.
        dtype: working precision, float64 unless asked otherwise.

    Raises:
        ModelError: (and its kinds) a model that cannot be run as lanes, naming the site.
        DataError: NaN or infinite data, or data outside the likelihood's support.
        KeywordError: a swept keyword that the model lacks.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        swept: Mapping[str, Tensor] | None = None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        data: Mapping[str, Tensor] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ):
        self.device = torch.device("cpu") if device is None else device
        self.dtype = dtype
        self.model = model
        self.points = LaneInputs(
            *(to_tensors(dict(part or {}), dtype, self.device) for part in (swept, weights, data))
        )
        self.swept = self.points.swept
        self.num_points = len(self.points.flat()[0]) if self.points.flat() else 1
        check_keywords(model, args, kwargs or {}, self.swept)
        self.args = to_tensors(tuple(args), dtype, self.device)
        self.kwargs = to_tensors(dict(kwargs or {}), dtype, self.device)
        self.argument_names = argument_names(model, self.args)
        self.seed = seed
        self.tie_strengths: dict[str, list[Any]] = {}  # tied site -> its sigma at every point, as first run
        self._first_runs()
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self._calls: Counter[Any] = Counter()
        self.loop_reason: str | None = None  # why lanes run one after another, if they do
        self.trace_failure: str | None = None  # why there are no graphs, if there are none

    # -- the validated run ---------------------------------------------------------------------------

    def _first_runs(self) -> None:
        # Every strength is run: an impossible one must be refused before any work is done. Hundreds of
        # data sets are not: a spread of them stands for all.
        chosen = (
            range(self.num_points)
            if self.num_points <= 100
            else range(0, self.num_points, self.num_points // 50)
        )
        store = pyro.get_param_store()
        self.params = to_tensors(store.get_state(), self.dtype, self.device)
        with (
            seeded(self.seed, self.device),
            model_defaults(self.dtype, self.device),
            pyro.validation_enabled(True),
            store.scope(self.params),
        ):
            for point in chosen:
                inputs = self.point(point)
                args, kwargs = self._arguments(inputs)
                first = _FirstRun()
                try:
                    with first:
                        self.model(*args, **kwargs)
                except BayestieError:
                    raise
                except Exception as error:
                    raise self._explain(error, first, inputs) from error
                if point == 0:
                    self._read_sites(first.messages)
                    self.fills = first.fills
                for name, site in first.messages.items():
                    if "bayestie" in site["infer"]:
                        self.tie_strengths.setdefault(name, []).append(site["infer"]["bayestie"]["sigma"])
        # pyro.param statements keep the values they have now: constants of the density.
        self.params = to_tensors(self.params, self.dtype, self.device)

    def _explain(self, error: Exception, first: _FirstRun, inputs: LaneInputs) -> BayestieError:
        args, keywords = self._arguments(inputs)
        arguments = dict(zip(self.argument_names, args, strict=False)) | keywords
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                return DataError(
                    f"argument '{name}'",
                    found=f"{int((~torch.isfinite(value)).sum())} NaN or infinite of {value.numel()} values",
                    expected="finite numbers",
                    fix=f"Clean or mask them; the model failed with: {str(error).splitlines()[0][:200]}",
                )
        last = next(reversed(first.messages), None)
        where = "before its first site" if last is None else f"after site '{last}'"
        at = ", ".join(f"{k}={float(v):g}" for k, v in inputs.swept.items())
        tie = self._tie_mismatch(error, first, {**arguments})
        if tie is not None:
            return tie
        return ModelError(
            f"model '{getattr(self.model, '__name__', type(self.model).__name__)}'"
            + (f" at {at}" if at else ""),
            found=f"{type(error).__name__} {where}: {' '.join(str(error).split())[:300]}",
            expected="a model that runs on its arguments",
            fix="Call the model by hand on the same arguments under pyro.enable_validation(True).",
        )

    @staticmethod
    def _tie_mismatch(
        error: Exception, first: _FirstRun, arguments: Mapping[str, Any]
    ) -> BayestieError | None:
        """The error, told as a tie whose copies the data do not fit, where it looks like one."""
        text = str(error).lower()
        if not any(word in text for word in ("size", "shape", "broadcast", "out of bounds", "out of range")):
            return None
        tied = {
            name: msg["infer"]["bayestie"]["tie"].num_copies
            for name, msg in first.messages.items()
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
            f"tied site '{name}' in a statement after site '{next(reversed(first.messages))}'",
            found=f"{num_copies} copies, data of shapes {lengths}{others}, and {type(error).__name__}: "
            + str(error).strip().splitlines()[0][:200],
            expected="copies that line up with the data, or an index into them",
            fix="Give the tie as many copies as there are units, or index them: theta[unit].",
        )

    def _read_sites(self, messages: Mapping[str, Any]) -> None:
        latent, observed, deterministic, enumerated = {}, {}, {}, []
        start = 0
        for name, msg in messages.items():
            value = msg["value"]
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            site = Site(name, shape, plate_dims(msg, shape), False, msg["infer"])
            if _is_deterministic(msg):
                deterministic[name] = site
            elif msg["is_observed"]:
                if type(msg["fn"]).__name__ != "Unit":  # pyro.factor: part of the density, not data
                    observed[name] = site
            elif _is_enumerated(msg):
                enumerated.append(name)
            else:
                unconstrained = tuple(biject_to(msg["fn"].support).inv(value).shape)
                latent[name] = Site(name, shape, site.dims, False, msg["infer"], unconstrained, start)
                start += math.prod(unconstrained)
        if not latent:
            raise NoLatentError(
                f"model '{getattr(self.model, '__name__', type(self.model).__name__)}'",
                found="no latent site" + (f" beside the enumerated {enumerated}" if enumerated else ""),
                expected="at least one pyro.sample without obs=",
                fix="Sample what you want to infer, and pass the data as arguments, not by name of a site.",
            )
        clash = sorted((set(messages) & set(self.swept)) | (set(messages) & {"chain", "draw"}))
        if clash:
            raise KeywordError(
                f"site '{clash[0]}'",
                found="a site with the name of a dimension of the results",
                expected=f"site names other than chain, draw and the swept {sorted(self.swept)}",
                fix="Rename the site or the swept keyword.",
            )
        self.latent, self.observed, self.deterministic = latent, observed, deterministic
        self.enumerated = enumerated
        # Pyro's obs_mask= makes a latent for every row, those that are observed as well.
        self.imputed = {
            f"{name}_unobserved": f"{name}_observed"
            for name in deterministic
            if f"{name}_unobserved" in latent and f"{name}_observed" in observed
        }
        self.num_latent = start
        self.observed_families = {name: _elementwise_family(messages[name]["fn"]) for name in observed}
        self.observed_values = {name: messages[name]["value"].detach() for name in observed}
        self.max_plate_nesting = max(
            (-f.dim for m in messages.values() for f in m["cond_indep_stack"] if f.vectorized), default=0
        )
        self.plates = {
            f.name: f.size for m in messages.values() for f in m["cond_indep_stack"] if f.vectorized
        }

    def _enumerating(self, first_available_dim: int) -> Callable[..., Any]:
        return _Enumerate(first_available_dim=first_available_dim)(self.model)

    # -- one lane ------------------------------------------------------------------------------------

    def run_lane(
        self,
        position: Tensor,
        inputs: LaneInputs,
        *,
        without: Set[str] = frozenset(),
        on_observed: Callable[[Any], None] | None = None,
        until: Set[str] | None = None,
    ) -> _Lane:
        """The model once, at one position; ``inputs`` without a lane axis. Enumerated sites excluded.

        The densities of the sites in ``without`` are not taken; ``on_observed`` sees each observed
        message before its density would be. The model is left once the sites in ``until`` are seen.
        """
        lane = _Lane(
            self.latent, position, inputs.weights, without, on_observed, self.fills, self.imputed, until
        )
        args, kwargs = self._arguments(inputs)
        with contextlib.suppress(_Enough), lane:
            self.model(*args, **kwargs)
        return lane

    def _arguments(self, inputs: LaneInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(
            inputs.data.get(name, value) for name, value in zip(self.argument_names, self.args, strict=True)
        )
        kwargs = {name: inputs.data.get(name, value) for name, value in self.kwargs.items()}
        return args, kwargs | dict(inputs.swept)

    def log_joint(self, position: Tensor, inputs: LaneInputs) -> Tensor:
        """log p(u, y) of one lane, the Jacobian included; a scalar."""
        if not self.enumerated:
            return self.run_lane(position, inputs).log_joint()
        lane = _Lane(self.latent, position, inputs.weights, fills=self.fills, imputed=self.imputed)
        args, kwargs = self._arguments(inputs)
        model = self._enumerating(-1 - self.max_plate_nesting)
        with mock.patch.object(torch_log, "safe_log", _vmappable_safe_log), lane:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            for name in (*self.fills, *self.imputed):
                trace.nodes[name].update(lane.mended(trace.nodes[name]))
            for name, weight in inputs.weights.items():
                node: Any = trace.nodes[name]
                node["scale"] = node["scale"] * weight
            evaluator = TraceEinsumEvaluator(trace, True, self.max_plate_nesting)
            return evaluator.log_prob(trace) + lane.log_jacobian

    # -- many lanes ----------------------------------------------------------------------------------

    def evaluate(self, position: Tensor, inputs: LaneInputs, *, gradient: bool = False) -> Any:
        """log joint, shape (lanes,), and on request its gradient, shape (lanes, num_latent), per lane.

        Lanes that leave the finite numbers hold NaN or -inf; they never raise for the batch.
        """
        if self.loop_reason is not None:
            return self._loop(position, inputs, gradient)
        try:
            return self._batched_function(position, inputs, gradient)(position, *inputs.flat())
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            self._fall_back(error)
            return self._loop(position, inputs, gradient)

    def _batched_function(self, position: Tensor, inputs: LaneInputs, gradient: bool) -> Callable[..., Any]:
        """The eager batched function for the first calls at a width, its traced graph from then on."""
        key = (gradient, position.shape, inputs.key())
        graph = self._graphs.get(key)
        if graph is not None:
            return graph
        self._calls[key] += 1
        eager = self.batched(gradient, inputs)
        if self._calls[key] > TRACE_AFTER and self.trace_failure is None:
            try:
                with self.quiet():
                    graph = make_fx(eager, _allow_non_fake_inputs=True)(position, *inputs.flat())
            except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
                # Lanes stay a batch, untraced: a model that reads numbers off tensors (a sequential plate).
                self.trace_failure = _first_line(error)
            else:
                graph.graph.eliminate_dead_code()
                graph.recompile()

                def traced(*tensors: Tensor) -> Any:
                    # A constant that the model made without a dtype is made anew by the graph.
                    with model_defaults(self.dtype, torch.device("cpu")):
                        return graph(*tensors)

                self._graphs[key] = traced
                return traced

        def run(*tensors: Tensor) -> Any:
            with self.quiet():
                return eager(*tensors)

        return run

    def batched(self, gradient: bool, like: LaneInputs) -> Callable[..., Any]:
        """The untraced batched function of (position, *flat inputs)."""

        def one(position: Tensor, *flat: Tensor) -> Tensor:
            return self.log_joint(position, like.unflatten(flat))

        forward = torch.vmap(one)
        if not gradient:
            return forward

        def value_and_grad(position: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
            # Lanes do not touch one another, so the gradient of their sum holds each lane's own. Plain
            # autograd outside vmap, because torch.func.grad imports the compiler stack (seconds).
            with torch.enable_grad():
                position = position.detach().requires_grad_(True)
                value = forward(position, *flat)
                (grad,) = torch.autograd.grad(value.sum(), position)
            return value.detach(), grad

        return value_and_grad

    def _fall_back(self, error: Exception) -> None:
        self.loop_reason = _first_line(error)
        name = getattr(self.model, "__name__", type(self.model).__name__)
        warnings.warn(
            f"model '{name}' cannot be vectorised over lanes, so lanes run one after another "
            f"({self.loop_reason})",
            UserWarning,
            stacklevel=2,
        )

    def _loop(self, position: Tensor, inputs: LaneInputs, gradient: bool) -> Any:
        values, grads = [], []
        with self.quiet():
            for i in range(len(position)):
                u = position[i].detach().clone().requires_grad_(gradient)
                one = inputs.unflatten([x[i] for x in inputs.flat()])
                try:
                    value = self.log_joint(u, one)
                    grad = torch.autograd.grad(value, u)[0] if gradient else None
                except (ValueError, RuntimeError) as error:
                    if not _is_numerical(error):
                        raise
                    value, grad = u.new_full((), float("nan")), torch.full_like(u, float("nan"))
                values.append(value.detach())
                grads.append(grad)
        return (torch.stack(values), torch.stack(grads)) if gradient else torch.stack(values)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Validation off, defaults set, factorisations that fail give NaN: the state in which lanes run."""
        with (
            model_defaults(self.dtype, self.device),
            pyro.validation_enabled(False),
            mock.patch.object(torch.linalg, "cholesky", _cholesky_or_nan),
            mock.patch.object(dist.OrderedLogistic, "__init__", _ordered_logistic),
            pyro.get_param_store().scope(self.params) if self.params["params"] else contextlib.nullcontext(),
        ):
            yield

    def point_inputs(self, points: Tensor) -> LaneInputs:
        """Lane inputs for the sweep's points named by the index tensor ``points``, shape (lanes,)."""
        return self.points.take(points)

    def point(self, index: int) -> LaneInputs:
        """The inputs of one point, without a lane axis."""
        return self.points.unflatten([x[index] for x in self.points.flat()])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _is_numerical(error: Exception) -> bool:
    text = str(error).lower()
    return any(
        word in text for word in ("cholesky", "singular", "positive-definite", "not positive", "linalg")
    )


def argument_names(model: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    try:
        parameters = list(inspect.signature(model).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (names + [f"arg_{i}" for i in range(len(names), len(args))])[: len(args)]


def check_keywords(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], swept: Mapping[str, Any]
) -> None:
    """Refuse swept keywords that the model lacks, and model keywords that collide with ours.

    Raises:
        KeywordError: naming the keyword and what the model takes.
    """
    try:
        parameters = inspect.signature(model).parameters
    except (TypeError, ValueError):
        return
    taken = [name for name in parameters if name in RESERVED]
    if taken:
        raise KeywordError(
            f"keyword '{taken[0]}' of the model",
            found=f"a model argument named like an option of fit and sweep ({', '.join(RESERVED)})",
            expected="another name",
            fix=f"Rename the model's '{taken[0]}', or wrap the model in a function that renames it.",
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    names = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)]
    for name in [*swept, *kwargs]:
        if name not in names:
            raise KeywordError(
                f"keyword '{name}'",
                found=f"no such argument of model '{getattr(model, '__name__', type(model).__name__)}'",
                expected=f"one of {names}",
                fix="Name a keyword of the model, or add it to the model's signature.",
            )
    absent = [
        n
        for n, p in list(parameters.items())
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    absent = [n for n in absent if n not in argument_names(model, args) and n not in (*swept, *kwargs)]
    if absent:
        own = getattr(model, "__name__", type(model).__name__)
        raise KeywordError(
            f"argument '{absent[0]}'",
            found="no value",
            expected=f"a value for each argument of model '{own}'",
            fix=f"Pass {absent[0]}=..., or sweep it with over=.",
        )
    positional = argument_names(model, args)
    for name in swept:
        if name in positional:
            raise KeywordError(
                f"keyword '{name}'",
                found="a swept keyword that is also passed as a positional argument",
                expected="swept values in over= alone",
                fix=f"Drop the positional '{name}', or make it keyword-only in the model (after *).",
            )
