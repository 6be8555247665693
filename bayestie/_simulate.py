"""Simulation: latents from the prior or as given, then data, at many strengths at once."""

import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from bayestie._density import MAX_ELEMENTS
from bayestie._errors import BayestieError, ModelError, ShapeError
from bayestie._lane import LaneInputs
from bayestie._messages import plate_dims
from bayestie._program import LaneProgram
from bayestie._run_context import model_defaults, seeded
from bayestie._vmap_mends import every_row


class Given(Messenger):
    """Puts values in place of those of sites, deterministic ones too; entered around everything else."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None:
            msg["value"], msg["done"] = check_shape(msg, value), True


def check_shape(msg: Any, value: Tensor) -> Tensor:
    """The value, if it has the shape of its site."""
    shape = tuple(msg["fn"].shape())
    if tuple(value.shape) != shape:
        raise ShapeError(
            f"value given for site '{msg['name']}'",
            found=f"shape {tuple(value.shape)}",
            expected=f"the site's own shape {shape}",
            fix="Copies come first, then the event shape; the model's arguments must fit the values.",
        )
    return value


class _Simulation(Messenger):
    """Draws what is not given, observed sites too; keeps values by (kind, name), and where latents lie."""

    def __init__(self, given: Mapping[str, Tensor], unconstrained: Set[str]):
        super().__init__()
        self.given, self.unconstrained = given, unconstrained
        self.observed: set[str] = set()
        self.values: dict[str, Tensor] = {}
        self.positions: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}
        self.dims: dict[str, tuple[str | None, ...]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) or msg["infer"].get("_deterministic"):
            return
        name = msg["name"]
        if name in self.given:
            msg["value"], msg["done"] = check_shape(msg, self.given[name]), True
        elif msg["is_observed"]:
            self.observed.add(name)
            if not isinstance(msg["fn"], dist.Unit):
                msg["is_observed"], msg["value"], msg["done"] = False, None, False

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if isinstance(msg["fn"], _Subsample | dist.Unit) or name == "_RETURN":
            return
        self.values[name] = msg["value"]
        fixed = msg["infer"].get("_deterministic")
        self.kinds[name] = "deterministic" if fixed else "observed" if name in self.observed else "latent"
        self.dims[name] = plate_dims(msg, tuple(msg["value"].shape))
        if name in self.unconstrained:
            self.positions[name] = biject_to(msg["fn"].support).inv(msg["value"])


class _OutOfPlace(TorchFunctionMode):
    """Random numbers as new tensors where torch.distributions fills empty ones in place.

    Under vmap a tensor made inside has no lane axis, so filling it would give every lane the same
    numbers; torch refuses. The callers use what the method returns, so a new tensor serves.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        draw = _RANDOM.get(func)
        if draw is None:
            return func(*args, **(kwargs or {}))
        return draw(*args, **(kwargs or {}))


_RANDOM: dict[Any, Callable[..., Tensor]] = {
    Tensor.normal_: lambda x, mean=0.0, std=1.0: mean + std * torch.randn_like(x),
    Tensor.uniform_: lambda x, low=0.0, high=1.0: low + (high - low) * torch.rand_like(x),
    Tensor.exponential_: lambda x, rate=1.0: -torch.log1p(-torch.rand_like(x)) / rate,
    Tensor.cauchy_: lambda x, loc=0.0, scale=1.0: (
        loc + scale * torch.tan(torch.pi * (torch.rand_like(x) - 0.5))
    ),
}


@dataclass(frozen=True)
class Simulated:
    """Values of N runs of a model, (N, *site shape) by site."""

    values: dict[str, Tensor]
    positions: dict[str, Tensor]  # latents on the real line
    kinds: dict[str, str]
    dims: dict[str, tuple[str | None, ...]]

    def of(self, kind: str) -> dict[str, Tensor]:
        return {name: x for name, x in self.values.items() if self.kinds[name] == kind}


@dataclass(frozen=True)
class Simulator:
    """A model with its arguments, to be run forward."""

    model: Callable[..., Any]
    argument_names: Sequence[str]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, program: LaneProgram) -> "Simulator":
        return cls(
            program.model, program.argument_names, program.args, program.kwargs, program.dtype, program.device
        )

    def run(
        self,
        inputs: LaneInputs,
        num: int,
        seed: int,
        *,
        given: Mapping[str, Tensor] | None = None,
        unconstrained: Set[str] = frozenset(),
    ) -> Simulated:
        """``num`` runs.

        Args:
            inputs: what differs from run to run, each (num, ...).
            num: number of runs.
            seed: of all random numbers.
            given: values (num, *site shape) of latents that are not to be drawn.
            unconstrained: latents whose place on the real line is wanted too.

        Raises:
            ModelError: a model that cannot be run forward.
            ShapeError: a value that does not fit its site.
        """
        given = dict(given or {})
        parts: list[dict[str, Tensor]] = []
        last: list[_Simulation] = []

        def one(_: Tensor, latents: dict[str, Tensor], *flat: Tensor) -> dict[str, Tensor]:
            lane = inputs.unflatten(flat)
            simulation = _Simulation(latents, unconstrained)
            args = [lane.data.get(n, v) for n, v in zip(self.argument_names, self.args, strict=True)]
            kwargs = {n: lane.data.get(n, v) for n, v in self.kwargs.items()} | dict(lane.swept)
            with simulation:
                self.model(*args, **kwargs)
            last[:] = [simulation]
            values = {f"value/{n}": x for n, x in simulation.values.items()}
            return values | {f"position/{n}": x for n, x in simulation.positions.items()}

        rows = sum(x[0].numel() for x in [*given.values(), *inputs.flat()]) + sum(
            x.numel() for x in [*self.args, *self.kwargs.values()] if isinstance(x, Tensor)
        )
        width = max(1, MAX_ELEMENTS // 4 // max(1, rows))
        with (
            seeded(seed, self.device),
            model_defaults(self.dtype, self.device),
            pyro.validation_enabled(False),
            every_row(),
            torch.no_grad(),
        ):
            for start in range(0, num, width):
                part = slice(start, min(start + width, num))
                lanes = torch.arange(part.start, part.stop, dtype=self.dtype)
                own = {n: x[part] for n, x in given.items()}
                parts.append(self._lanes(one, lanes, own, [x[part] for x in inputs.flat()]))
        joined = {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
        found = {kind: {} for kind in ("value", "position")}
        for key, value in joined.items():
            kind, name = key.split("/", 1)
            found[kind][name] = value
        return Simulated(found["value"], found["position"], last[0].kinds, last[0].dims)

    def _lanes(
        self, one: Callable[..., Any], lanes: Tensor, given: dict[str, Tensor], flat: list[Tensor]
    ) -> dict[str, Tensor]:
        try:
            with _OutOfPlace(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return torch.vmap(one, randomness="different")(lanes, given, *flat)
        except BayestieError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
            pass  # what cannot be drawn under vmap is drawn run by run, which also names what is wrong
        rows = []
        for i in range(len(lanes)):
            try:
                rows.append(one(lanes[i], {n: x[i] for n, x in given.items()}, *(x[i] for x in flat)))
            except BayestieError:
                raise
            except Exception as error:
                text = str(error).strip().splitlines() or [""]
                raise ModelError(
                    f"simulating model '{getattr(self.model, '__name__', type(self.model).__name__)}'",
                    found=f"{type(error).__name__}: {text[0][:300]}",
                    expected="a model that runs on these arguments and can sample every site",
                    fix="Run it by hand under pyro.poutine.uncondition; improper priors cannot be sampled.",
                ) from error
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def refuse_factors(program: LaneProgram) -> None:
    """A factor changes the prior, so that running the model forward does not sample from it."""
    inputs = program.point(0)
    with torch.no_grad(), program.quiet():
        lane = program.run_lane(torch.zeros(program.num_latent).to(program.dtype), inputs)
    for name, msg in lane.messages.items():
        if isinstance(msg["fn"], dist.Unit):
            raise ModelError(
                f"site '{name}'",
                found="a pyro.factor, which reweights the prior",
                expected="a model that draws its latents and data when run forward",
                fix="State the factor as a distribution, or leave simulation from the prior out.",
            )


def data_arguments(program: LaneProgram) -> dict[str, str]:
    """Observed site -> the model's argument that holds its values.

    Raises:
        ModelError: no argument holds a site's values, several do, or the model uses the argument
            beside observing it.
    """
    arguments = dict(zip(program.argument_names, program.args, strict=True)) | program.kwargs
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    found: dict[str, str] = {}
    for site, value in program.observed_values.items():
        equal = [n for n, x in tensors.items() if _same_values(x, value)]
        same = [n for n in equal if tensors[n].data_ptr() == value.data_ptr()]
        chosen = same if len(same) == 1 else equal
        if len(chosen) != 1 or chosen[0] in found.values():
            raise ModelError(
                f"observed site '{site}'",
                found="no argument of the model that holds its values"
                if not chosen
                else f"arguments {chosen} that hold the same values",
                expected="one argument per observed site, observed as it is (obs=argument)",
                fix="Pass the data as an argument of the model, with any transformation done before.",
            )
        found[site] = chosen[0]
    return found


def _same_values(argument: Tensor, value: Tensor) -> bool:
    if argument.shape != value.shape:
        return False
    return torch.equal(argument, value) or torch.allclose(
        argument.double(), value.double(), rtol=0.0, atol=0.0, equal_nan=True
    )


def simulate_data(
    program: LaneProgram, points: Tensor, seed: int, truth: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], Simulated]:
    """One data set per entry of ``points`` (indices of the program's points), by model argument.

    Args:
        program: the model with arguments of the right shapes.
        points: which strength each data set is drawn at.
        seed: of all random numbers.
        truth: values of sites, the same in every data set; the rest is drawn from the prior.

    Raises:
        ModelError: data that cannot be simulated, or put in place of the given ones.
    """
    holders = data_arguments(program)
    if truth is None:
        refuse_factors(program)
    with Given(truth or {}):
        simulated = Simulator.of(program).run(
            program.point_inputs(points), len(points), seed, unconstrained=set(program.latent)
        )
    arguments = dict(zip(program.argument_names, program.args, strict=True)) | program.kwargs
    data = {}
    for site, name in holders.items():
        value = simulated.values[site]
        if value.shape[1:] != arguments[name].shape:
            raise ModelError(
                f"observed site '{site}'",
                found=f"a likelihood of shape {tuple(value.shape[1:])}",
                expected=f"the shape of argument '{name}', {tuple(arguments[name].shape)}",
                fix="Declare the site in a plate as long as its data.",
            )
        data[name] = value.to(arguments[name].dtype)
    _check_only_observed(program, holders, data)
    return data, simulated


def _check_only_observed(
    program: LaneProgram, holders: Mapping[str, str], data: Mapping[str, Tensor]
) -> None:
    """Nothing else in the model may move with the data: a simulated set would be drawn given the old one."""
    generator = torch.Generator().manual_seed(program.seed)
    position = 0.3 * torch.randn(program.num_latent, dtype=program.dtype, generator=generator)
    position = position.to(program.device)
    inputs = program.point(0)
    seen: list[dict[str, Tensor]] = []
    for part in ({}, {name: x[0] for name, x in data.items()}):
        log_densities: dict[str, Tensor] = {}

        def see(msg: Any, found: dict[str, Tensor] = log_densities) -> None:
            found[msg["name"]] = msg["fn"].log_prob(program.observed_values[msg["name"]])

        own = LaneInputs(inputs.swept, inputs.weights, {**inputs.data, **part})
        with torch.no_grad(), program.quiet():
            lane = program.run_lane(position, own, without=set(program.observed), on_observed=see)
        seen.append({**lane.log_densities, **log_densities})
    for site, before in seen[0].items():
        if not torch.allclose(before, seen[1][site], equal_nan=True):
            raise ModelError(
                f"site '{site}'",
                found=f"a distribution that depends on the data {sorted(holders.values())}",
                expected="data that the model observes and uses nowhere else",
                fix="Pass what else depends on the data as an argument of its own.",
            )
