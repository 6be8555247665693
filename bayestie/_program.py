"""Pyro model -> lane program: one pure function of a flat unconstrained vector, batched over lanes."""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import MethodType
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from torch.utils._pytree import tree_flatten

from bayestie._enumerated import enumerated_log_prob
from bayestie._errors import BayestieError, KeywordError, NoLatentError
from bayestie._first_run import FirstRun, explained
from bayestie._lane import Enough, Lane, LaneInputs, Site
from bayestie._messages import (
    elementwise_family,
    is_deterministic,
    is_enumerated,
    plate_dims,
    weight_of_rows,
)
from bayestie._model_arguments import argument_names, check_keywords
from bayestie._run_context import model_defaults, seeded, to_tensors
from bayestie._tiers import Tiers, described
from bayestie._vmap_mends import Enumerate, every_row, mended, mended_enumeration


class LaneProgram:
    """A Pyro model as a batched pure function f(u, swept, weights, data) -> log joint density.

    ``u`` is the flat unconstrained vector of length ``num_latent``; the density includes the Jacobian of
    the maps to the constrained supports, so it is Pyro's potential with the sign turned.

    Plates hold all their rows whatever their ``subsample_size``; ``minibatches`` says which plates ask for
    fewer, plate -> (rows of a minibatch, all rows). Where ``rows`` are given by plate, index tensors that
    all lanes share, these plates hold those rows and their densities are scaled as Pyro scales them.

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
        validated: the program of an earlier call. If its model, arguments and points are these, its validated
            runs stand for those between the first and the last point.

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
        validated: "LaneProgram | None" = None,
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
        self._first_runs(validated)
        self.tiers = Tiers(self.quiet, self.dtype, self.device)
        self.loop_reason: str | None = None  # why lanes run one after another, if they do

    # -- the validated run ---------------------------------------------------------------------------

    def _first_runs(self, validated: "LaneProgram | None") -> None:
        # Every strength is run: an impossible one must be refused before any work is done. Hundreds of
        # data sets are not: a spread of them stands for all.
        chosen = (
            range(self.num_points)
            if self.num_points <= 100
            else range(0, self.num_points, self.num_points // 50)
        )
        self.params = to_tensors(pyro.get_param_store().get_state(), self.dtype, self.device)
        if validated is not None and self.has_inputs_of(validated):
            chosen = sorted({0, self.num_points - 1})
            self.tie_strengths = dict(validated.tie_strengths)
        else:
            validated = None
        self.minibatches: dict[str, tuple[int, int]] = {}
        with self._validated(), every_row(self.minibatches):
            for point in chosen:
                first = self._first_run(self.point(point), {})
                if point == 0:
                    self._read_sites(first.messages)
                    self.fills = first.fills
                for name, site in first.messages.items() if validated is None else ():
                    if "bayestie" in site["infer"]:
                        self.tie_strengths.setdefault(name, []).append(site["infer"]["bayestie"]["sigma"])
        # pyro.param statements keep the values they have now: constants of the density.
        self.params = to_tensors(self.params, self.dtype, self.device)

    @contextlib.contextmanager
    def _validated(self) -> Iterator[None]:
        with (
            seeded(self.seed, self.device),
            model_defaults(self.dtype, self.device),
            pyro.validation_enabled(True),
            pyro.get_param_store().scope(self.params),
        ):
            yield

    def has_inputs_of(self, other: "LaneProgram") -> bool:
        """Whether model, arguments, parameters and points are the same, device and precision too."""
        if identity(self.model) != identity(other.model):
            return False
        if (self.dtype, self.device) != (other.dtype, other.device):
            return False
        ours, theirs = (
            tree_flatten((p.args, p.kwargs, p.params, p.points.key(), p.points.flat())) for p in (self, other)
        )
        return ours[1] == theirs[1] and all(map(_is_equal, ours[0], theirs[0]))

    def _first_run(self, inputs: LaneInputs, rows: Mapping[str, Tensor]) -> FirstRun:
        args, kwargs = self._arguments(inputs)
        first = FirstRun(rows)
        try:
            with first:
                self.model(*args, **kwargs)
        except BayestieError:
            raise
        except Exception as error:
            arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
            raise explained(error, first, self.model, arguments, inputs.swept) from error
        return first

    def check_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Run the model once, validated, on some of its rows.

        Raises:
            ModelError: (and its kinds) a model that does not run on them.
        """
        with self._validated(), every_row():
            self._first_run(self.point(0), rows)
        if self.enumerated:
            with self.quiet():
                position = torch.zeros(self.num_latent, dtype=self.dtype, device=self.device)
                self.log_joint(position, self.point(0), rows)

    def _read_sites(self, messages: Mapping[str, Any]) -> None:
        latent, observed, deterministic, enumerated = {}, {}, {}, []
        start = 0
        for name, msg in messages.items():
            value = msg["value"]
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            site = Site(name, shape, plate_dims(msg, shape), False, msg["infer"])
            if is_deterministic(msg):
                deterministic[name] = site
            elif msg["is_observed"]:
                if type(msg["fn"]).__name__ != "Unit":  # pyro.factor: part of the density, not data
                    observed[name] = site
            elif is_enumerated(msg):
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
        self.observed_families = {name: elementwise_family(messages[name]["fn"]) for name in observed}
        self.observed_values = {name: messages[name]["value"].detach() for name in observed}
        self.max_plate_nesting = max(
            (-f.dim for m in messages.values() for f in m["cond_indep_stack"] if f.vectorized), default=0
        )
        self.latent_plates = {  # latent -> names of the plates that it stands in, sequential ones too
            name: [frame.name for frame in messages[name]["cond_indep_stack"]] for name in latent
        }
        self.plates = {
            f.name: f.size for m in messages.values() for f in m["cond_indep_stack"] if f.vectorized
        }

    def _enumerating(self, first_available_dim: int) -> Callable[..., Any]:
        return Enumerate(first_available_dim=first_available_dim)(self.model)

    # -- one lane ------------------------------------------------------------------------------------

    def run_lane(
        self,
        position: Tensor,
        inputs: LaneInputs,
        *,
        without: Set[str] = frozenset(),
        on_observed: Callable[[Any], None] | None = None,
        until: Set[str] | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Lane:
        """The model once, at one position; ``inputs`` without a lane axis. Enumerated sites excluded.

        The densities of the sites in ``without`` are not taken; ``on_observed`` sees each observed
        message before its density would be. The model is left once the sites in ``until`` are seen.
        """
        lane = Lane(
            self.latent, position, inputs.weights, without, on_observed, self.fills, self.imputed, until, rows
        )
        args, kwargs = self._arguments(inputs)
        with contextlib.suppress(Enough), lane:
            self.model(*args, **kwargs)
        return lane

    def _arguments(self, inputs: LaneInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = tuple(
            inputs.data.get(name, value) for name, value in zip(self.argument_names, self.args, strict=True)
        )
        kwargs = {name: inputs.data.get(name, value) for name, value in self.kwargs.items()}
        return args, kwargs | dict(inputs.swept)

    def log_joint(
        self, position: Tensor, inputs: LaneInputs, rows: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """log p(u, y) of one lane, the Jacobian included; a scalar."""
        rows = rows or {}
        if not self.enumerated:
            return self.run_lane(position, inputs, rows=rows).log_joint()
        lane = Lane(self.latent, position, inputs.weights, fills=self.fills, imputed=self.imputed, rows=rows)
        args, kwargs = self._arguments(inputs)
        model = self._enumerating(-1 - self.max_plate_nesting)
        with mended_enumeration(), lane:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            for name in (*self.fills, *self.imputed):
                trace.nodes[name].update(lane.mended(trace.nodes[name]))
            for name, weight in inputs.weights.items():
                node: Any = trace.nodes[name]
                node["scale"] = node["scale"] * weight_of_rows(node, weight, rows)
            return enumerated_log_prob(trace, self.max_plate_nesting, rows) + lane.log_jacobian

    # -- many lanes ----------------------------------------------------------------------------------

    def evaluate(
        self,
        position: Tensor,
        inputs: LaneInputs,
        *,
        gradient: bool = False,
        rows: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """log joint, shape (lanes,), and on request its gradient, shape (lanes, num_latent), per lane.

        Lanes that leave the finite numbers hold NaN or -inf; they never raise for the batch. ``rows`` are
        the rows that all lanes see of the plates it names, all of them elsewhere.
        """
        rows = rows or {}
        if self.loop_reason is not None:
            return self._loop(position, inputs, gradient, rows)
        try:
            function = self._batched_function(position, inputs, gradient, rows)
            return function(position, *inputs.flat(), *rows.values())
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            # What vmap cannot do, in whatever words: a loop can, and a warning names the reason.
            self._fall_back(error)
            return self._loop(position, inputs, gradient, rows)

    def _batched_function(
        self, position: Tensor, inputs: LaneInputs, gradient: bool, rows: Mapping[str, Tensor]
    ) -> Callable[..., Any]:
        key = (gradient, position.shape, inputs.key(), tuple((name, len(x)) for name, x in rows.items()))
        eager = self.batched(gradient, inputs, tuple(rows))
        return self.tiers.function(key, eager, [position, *inputs.flat(), *rows.values()])

    def batched(self, gradient: bool, like: LaneInputs, plates: Sequence[str] = ()) -> Callable[..., Any]:
        """The untraced batched function of (position, *flat inputs, *rows of ``plates``)."""
        num_inputs = len(like.flat())

        def one(position: Tensor, *flat: Tensor) -> Tensor:
            rows = dict(zip(plates, flat[num_inputs:], strict=True))
            return self.log_joint(position, like.unflatten(flat[:num_inputs]), rows)

        forward = torch.vmap(one, in_dims=(*[0] * (1 + num_inputs), *[None] * len(plates)))
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
        self.loop_reason = described(error)
        name = getattr(self.model, "__name__", type(self.model).__name__)
        warnings.warn(
            f"model '{name}' cannot be vectorised over lanes, so lanes run one after another "
            f"({self.loop_reason})",
            UserWarning,
            stacklevel=2,
        )

    def _loop(self, position: Tensor, inputs: LaneInputs, gradient: bool, rows: Mapping[str, Tensor]) -> Any:
        values, grads = [], []
        with self.quiet():
            for i in range(len(position)):
                u = position[i].detach().clone().requires_grad_(gradient)
                one = inputs.unflatten([x[i] for x in inputs.flat()])
                try:
                    value = self.log_joint(u, one, rows)
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
            mended(),
            pyro.get_param_store().scope(self.params) if self.params["params"] else contextlib.nullcontext(),
        ):
            yield

    def take(self, points: Tensor) -> "LaneProgram":
        """The program at some of its points; what was compiled is shared."""
        some = copy.copy(self)
        some.points = self.points.take(points)
        some.swept, some.num_points = some.points.swept, len(points)
        return some

    def point_inputs(self, points: Tensor) -> LaneInputs:
        """Lane inputs for the sweep's points named by the index tensor ``points``, shape (lanes,)."""
        return self.points.take(points)

    def point(self, index: int) -> LaneInputs:
        """The inputs of one point, without a lane axis."""
        return self.points.unflatten([x[index] for x in self.points.flat()])


def identity(model: Callable[..., Any]) -> tuple[int, int]:
    """What tells a model from others that are alive: a method is made anew whenever it is named."""
    if isinstance(model, MethodType):
        return id(model.__self__), id(model.__func__)
    return id(model), 0


def _is_equal(ours: Any, theirs: Any) -> bool:
    if ours is theirs:
        return True
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return isinstance(ours, bool | int | float | str) and type(ours) is type(theirs) and ours == theirs


def _is_numerical(error: Exception) -> bool:
    text = str(error).lower()
    return any(
        word in text for word in ("cholesky", "singular", "positive-definite", "not positive", "linalg")
    )
