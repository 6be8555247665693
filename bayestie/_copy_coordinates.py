"""A model in the coordinates of its copies: theta itself in place of (level, z).

With theta given, `tied` states no site, so that a likelihood is seen as a function of the copies, one entry
of which most observations need (DESIGN section 5, Coordinates are the engine's choice).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from bayestie._families import NotAffine, predictors_of
from bayestie._lane import LaneInputs, Site
from bayestie._messages import base_distribution
from bayestie._program import LaneProgram
from bayestie._tie_arguments import align
from bayestie._tie_priors import TiePrior
from bayestie._ties import Tie

MAX_HYPER = 20  # latents that may stand outside the Gaussian part


class NotSparse(Exception):
    """Why a model cannot be served in the coordinates of its copies, as the end of a sentence."""


class GivenCopies(Messenger):
    """Gives each tied statement its copies, and keeps the prior that it states."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values
        self.priors: dict[str, TiePrior] = {}

    def _pyro_tied(self, msg: Any) -> None:
        msg["fn"] = self._given

    def _given(
        self, name: str, tie: Tie, sigma: Any, base: Any, form: Any, event_shape: Any, event_scale_tril: Any
    ) -> Tensor:
        args = align(tie, sigma, base, form, tuple(event_shape), event_scale_tril, site=name)
        self.priors[name] = TiePrior(args)
        return self.values[name]


@dataclass(frozen=True)
class Block:
    """A part of the vector x of copies and Gaussian latents.

    ``tied`` says whether it holds the copies (K, *E) of a tied statement, flat, or the latent site ``name``.
    """

    name: str
    tied: bool
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def num_events(self) -> int:
        """Elements of one copy."""
        return math.prod(self.shape[1:]) if self.tied else 1


@dataclass(frozen=True)
class Reading:
    """The model run once: the priors it states, its latents' messages, its likelihoods' predictors."""

    priors: Mapping[str, TiePrior]
    messages: Mapping[str, Any]
    likelihoods: Mapping[str, tuple[Any, dict[str, Tensor]]]
    log_hyper: float  # log density of the latents outside the Gaussian part, Jacobians included


class CopyProgram:
    """A lane program as a function of x, the copies and Gaussian latents, and h, the few other latents.

    Args:
        program: the lane program.

    Raises:
        NotSparse: a statement that x cannot hold.
    """

    def __init__(self, program: LaneProgram):
        self.program = program
        if program.enumerated or program.loop_reason is not None:
            raise NotSparse("it enumerates a latent, or does not run as lanes")
        tied = {n: s for n, s in program.deterministic.items() if "bayestie" in s.infer}
        if not tied:
            raise NotSparse("it states no tied copies")
        self.own: set[str] = set()
        for name, site in tied.items():
            about, z = site.infer["bayestie"], program.latent.get(f"{name}_z")
            if z is not None and z.shape != (about["tie"].rank, *about["event_shape"]):
                raise NotSparse(f"tied site '{name}' stands in a plate")
            if z is None and program.latent.get(f"{name}_level") is None:
                raise NotSparse(f"tied site '{name}' has no latent")
            self.own |= {f"{name}{part}" for part in ("_z", "_level", "_level_z")}
        self.tied = tied
        self.plain = {n: s for n, s in program.latent.items() if n not in self.own}
        generator = torch.Generator().manual_seed(program.seed)
        self.probes = [
            0.5
            * torch.randn(sum(s.size for s in self.plain.values()), dtype=program.dtype, generator=generator)
            for _ in range(3)
        ]
        self.gaussian = self._gaussian_sites()
        self._lay_out()
        self._demote()
        if self.num_hyper > MAX_HYPER:
            raise NotSparse(
                f"{self.num_hyper} latents are neither copies nor Gaussian with affine effect "
                f"({', '.join(self.hyper)}), at most {MAX_HYPER} may be"
            )

    # -- what is in x ----------------------------------------------------------------------------------

    def _plain_positions(self, probe: Tensor) -> dict[str, Tensor]:
        sizes = [site.size for site in self.plain.values()]
        return dict(zip(self.plain, probe.split(sizes), strict=True))

    def _gaussian_sites(self) -> set[str]:
        """Latents with a Normal prior whose parameters no latent moves."""
        found = []
        for probe in self.probes[:2]:
            self.blocks, self.hyper = self._tied_blocks(), dict(self.plain)
            self.num_hyper = sum(s.size for s in self.plain.values())
            self.num_x = sum(block.size for block in self.blocks)
            found.append(self.read(0, torch.zeros(self.num_x, dtype=self.program.dtype), probe).messages)
        gaussian = set()
        for name, site in self.plain.items():
            fn, base = found[0][name]["fn"], base_distribution(found[0][name]["fn"])
            other = base_distribution(found[1][name]["fn"])
            if (
                type(base).__name__ == "Normal"
                and not fn.support.is_discrete
                and isinstance(base.support, type(constraints.real))
                and site.shape == site.unconstrained_shape
                and found[0][name]["mask"] is None
                and torch.equal(base.loc, other.loc)
                and torch.equal(base.scale, other.scale)
            ):
                gaussian.add(name)
        return gaussian

    def _tied_blocks(self) -> list[Block]:
        blocks, start = [], 0
        for name, site in self.tied.items():
            about = site.infer["bayestie"]
            block = Block(name, True, (about["tie"].num_copies, *about["event_shape"]), start)
            blocks.append(block)
            start += block.size
        return blocks

    def _lay_out(self) -> None:
        self.blocks = self._tied_blocks()
        start = sum(block.size for block in self.blocks)
        for name, site in self.plain.items():
            if name in self.gaussian:
                self.blocks.append(Block(name, False, site.shape, start))
                start += site.size
        self.hyper: dict[str, Site] = {n: s for n, s in self.plain.items() if n not in self.gaussian}
        self.num_x = start
        self.num_hyper = sum(site.size for site in self.hyper.values())

    def _demote(self) -> None:
        """Gaussian latents that do not enter a predictor affinely join h (a log scale, for example)."""
        hyper = self.hyper_probe(0)
        for block in [b for b in self.blocks if not b.tied]:
            step = torch.zeros(self.num_x, dtype=self.program.dtype)
            step[block.slice] = 0.3 + 0.2 * torch.rand(
                block.size, dtype=self.program.dtype, generator=torch.Generator().manual_seed(1)
            )
            values = [self.predictors(0, t * step, hyper) for t in (0.0, 1.0, 2.0)]
            curved, scale_moves = False, False
            for site, first in values[0].items():
                for name, at_zero in first.items():
                    one, two = (v[site][name] for v in values[1:])
                    curved |= not torch.allclose(two - one, one - at_zero, rtol=1e-9, atol=1e-9)
                    scale_moves |= name == "scale" and not torch.equal(one, at_zero)
            ties = [stated(self.read(0, t * step, hyper).priors) for t in (0.0, 1.0)]
            ties_move = any(not torch.equal(a, b) for a, b in zip(*ties, strict=True))
            if curved or scale_moves or ties_move:
                self.gaussian.discard(block.name)
        self._lay_out()
        self._check_rest()

    def _check_rest(self) -> None:
        """Nothing but the predictors may depend on x: neither what ties state nor factors."""
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.num_x, dtype=self.program.dtype, generator=generator)
        hyper = self.hyper_probe(0)
        still, moved = (self.read(0, at, hyper) for at in (torch.zeros_like(x), x))
        pairs = zip(stated(still.priors), stated(moved.priors), strict=True)
        if any(not torch.equal(a, b) for a, b in pairs):
            raise NotSparse("what a tied site states depends on the copies of another")
        if abs(still.log_hyper - moved.log_hyper) > 1e-9 * (1.0 + abs(still.log_hyper)):
            raise NotSparse("the density of a latent or a factor depends on copies or Gaussian latents")

    def hyper_probe(self, index: int) -> Tensor:
        """A position of the latents outside x, (num_hyper,)."""
        parts = self._plain_positions(self.probes[index])
        kept = [parts[name] for name in self.hyper]
        return torch.cat(kept) if kept else self.probes[0].new_zeros(0)

    # -- runs --------------------------------------------------------------------------------------------

    def given(self, x: Tensor) -> dict[str, Tensor]:
        """Copies of each tied statement, (K, *E), in x (num_x,)."""
        return {b.name: x[b.slice].reshape(b.shape) for b in self.blocks if b.tied}

    def position(self, x: Tensor, hyper: Tensor) -> Tensor:
        """The program's flat vector with every plain latent in its place; (level, z) are left at 0."""
        flat = x.new_zeros(self.program.num_latent)
        for block in self.blocks:
            if not block.tied:
                flat[self.program.latent[block.name].slice] = x[block.slice]
        start = 0
        for site in self.hyper.values():
            flat[site.slice] = hyper[start : start + site.size]
            start += site.size
        return flat

    def inputs(self, point: int) -> LaneInputs:
        return self.program.point(point)

    def predictors(self, point: int, x: Tensor, hyper: Tensor) -> dict[str, dict[str, Tensor]]:
        """Likelihood site -> its parameters on the real line."""
        try:
            with torch.no_grad(), self.program.quiet(), GivenCopies(self.given(x)):
                found = predictors_of(self.program, self.position(x, hyper), self.inputs(point))
        except NotAffine as error:
            raise NotSparse(str(error)) from error
        return {site: parameters for site, (_, parameters) in found.items()}

    def read(self, point: int, x: Tensor, hyper: Tensor) -> Reading:
        """The model at one point of the sweep, once for its priors and once for its likelihoods."""
        program, inputs = self.program, self.inputs(point)
        at = self.position(x, hyper)
        with torch.no_grad(), program.quiet():
            with GivenCopies(self.given(x)) as given:
                lane = program.run_lane(at, inputs, without=set(program.observed))
            try:
                with GivenCopies(self.given(x)):
                    likelihoods = predictors_of(program, at, inputs)
            except NotAffine as error:
                raise NotSparse(str(error)) from error
        if set(given.priors) != set(self.tied):
            raise NotSparse("its tied statements differ from run to run")
        log_hyper = lane.log_jacobian
        for name, value in lane.log_densities.items():
            if name in self.hyper or name not in program.latent:  # pyro.factor stands with the latter
                log_hyper = log_hyper + value.sum()
        return Reading(given.priors, lane.messages, likelihoods, float(log_hyper))


def stated(priors: Mapping[str, TiePrior]) -> list[Tensor]:
    """The numbers that tied statements were made with."""
    found: list[Tensor] = []
    for prior in priors.values():
        args, law = prior.args, prior.level_distribution
        found.append(args.sigma)
        found += [x for x in (prior.known_level, args.event_scale_tril) if x is not None]
        if law is not None:
            found += [law.mean, law.variance]
    return found


def sites_of(reading: Reading, names: Sequence[str]) -> list[Any]:
    """The distributions of some latents, in order."""
    return [base_distribution(reading.messages[name]["fn"]) for name in names]
