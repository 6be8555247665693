"""The log joint of a sweep in the coordinates of the copies: sparse prior, likelihoods of sparse predictors.

x holds the copies of every tied statement, the hubs' levels and the Gaussian latents; eta = A x + b. At a
point of the sweep (and, where a few latents h stand outside x, at a value of h)

    log p(y, x, h) = log p(h) + log N(x; m, P, directions) + sum_i target_i eta_i - weight_i A(eta_i) + const.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._copy_coordinates import Block, CopyProgram, NotSparse, Reading, sites_of
from bayestie._errors import first_line
from bayestie._families import Family, link_of
from bayestie._messages import base_distribution
from bayestie._program import LaneProgram
from bayestie._sparse_map import NotSparseMap, find_map
from bayestie._sparse_numbers import Likelihood, Numbers
from bayestie._sparse_prior import Level, PriorPart, copies_part, hard_part, is_hard, level_of
from bayestie._sparse_structure import Structure


@dataclass(frozen=True)
class Predictor:
    """A likelihood site and the one parameter of it that x moves."""

    site: str
    name: str
    shape: torch.Size
    rows: slice


class SparseDensity:
    """The density of a lane program in the coordinates of its copies.

    Args:
        program: the lane program.

    Raises:
        NotSparse: why this model is not served.
    """

    route = "sparse"

    def __init__(self, program: LaneProgram):
        if program.device.type != "cpu" or program.dtype != torch.float64:
            raise NotSparse("it runs on another device, or not in float64")
        self.program = program
        self.copies = CopyProgram(program)
        self.num_latent = program.num_latent
        self.predictors: list[Predictor] = []
        self._find_predictors()
        self._find_map()
        self.structures: dict[tuple[Any, ...], Structure] = {}

    # -- the map -----------------------------------------------------------------------------------------

    def _find_predictors(self) -> None:
        copies = self.copies
        generator = torch.Generator().manual_seed(5)
        zero = torch.zeros(copies.num_x, dtype=torch.float64)
        some = 0.3 + 0.4 * torch.rand(copies.num_x, dtype=torch.float64, generator=generator)
        hyper, other = copies.hyper_probe(0), copies.hyper_probe(1)
        first, moved = copies.predictors(0, zero, hyper), copies.predictors(0, some, hyper)
        turned = copies.predictors(0, zero, other)
        start = 0
        reading = copies.read(0, zero, hyper)
        for site, parameters in first.items():
            by_x = [n for n, v in parameters.items() if not torch.equal(v, moved[site][n])]
            by_h = [n for n, v in parameters.items() if not torch.equal(v, turned[site][n])]
            if not by_x:
                if by_h:
                    raise NotSparse(f"observed site '{site}' depends on no tied copies, but on other latents")
                continue
            if len(by_x) > 1 or by_x[0] in by_h:
                raise NotSparse(f"the parameters of observed site '{site}' mix copies and other latents")
            message = reading.likelihoods[site][0]
            base = base_distribution(message["fn"])
            shape = torch.Size(np.broadcast_shapes(base.batch_shape, message["value"].shape))
            rows = slice(start, start + shape.numel())
            self.predictors.append(Predictor(site, by_x[0], shape, rows))
            start = rows.stop
        if not self.predictors:
            raise NotSparse("no observed site depends on the copies")

    def _eta(self, point: int, x: np.ndarray, hyper: Tensor) -> np.ndarray:
        found = self.copies.predictors(point, torch.from_numpy(x), hyper)
        parts = [found[p.site][p.name].expand(p.shape).reshape(-1) for p in self.predictors]
        return torch.cat(parts).numpy()

    def _find_map(self) -> None:
        copies = self.copies
        hyper = copies.hyper_probe(0)
        groups = [
            np.arange(block.start + e, block.start + block.size, block.num_events)
            for block in copies.blocks
            for e in range(block.num_events)
        ]
        try:
            self.map, self.offset = find_map(
                lambda x: self._eta(0, x, hyper), groups, copies.num_x, self.program.seed
            )
        except NotSparseMap as error:
            raise NotSparse(str(error)) from error
        probe = 0.5 * np.random.default_rng(3).standard_normal(copies.num_x)
        expected = self.map @ probe + self.offset
        last = self.program.num_points - 1
        for point in sorted({0, last // 3, 2 * last // 3, last}):
            for other in (hyper, copies.hyper_probe(1)):
                found = self._eta(point, probe, other)
                if not (np.abs(found - expected) <= 1e-9 * (1.0 + np.abs(found))).all():
                    raise NotSparse("predictors change with the strength or with other latents")

    # -- one point -----------------------------------------------------------------------------------------

    def at(self, point: int, hyper: Tensor) -> tuple[Structure, Numbers]:
        """Structure and numbers of one point of the sweep, at one value of the latents outside x."""
        zero = torch.zeros(self.copies.num_x, dtype=torch.float64)
        reading = self.copies.read(point, zero, hyper)
        parts, modes, levels = [], [], {}
        for block in self.copies.blocks:
            part, mode = self._part(block, reading)
            if block.tied:
                levels[block.name] = level_of(reading.priors[block.name])
            parts.append(part)
            modes.append(mode)
        key = tuple((m, p.size, len(p.directions)) for m, p in zip(modes, parts, strict=True))
        if key not in self.structures:
            self.structures[key] = Structure(self.copies, self.map, parts, modes)
        structure = self.structures[key]
        shift = self._shift(modes, levels)
        precision = structure.prior_precision(parts)
        numbers = Numbers(
            precision=precision,
            prior=structure.matrix(precision),
            mean=np.concatenate([p.mean for p in parts]),
            variances=np.array([v for p in parts for v in p.variances]),
            constant=sum(p.constant for p in parts) + reading.log_hyper,
            offset=self.offset + self.map @ shift if shift.any() else self.offset,
            shift=shift,
            likelihoods=tuple(self._likelihood(p, reading, point) for p in self.predictors),
            levels=levels,
            reading=reading,
        )
        return structure, self._with_still(numbers, point)

    def parts(self, point: int, hyper: Tensor) -> list[PriorPart]:
        """The prior of every block of x at one point and h."""
        reading = self.copies.read(point, torch.zeros(self.copies.num_x, dtype=torch.float64), hyper)
        return [self._part(block, reading)[0] for block in self.copies.blocks]

    def _with_still(self, numbers: Numbers, point: int) -> Numbers:
        """Observed sites that no latent moves add a constant."""
        moving = {p.site for p in self.predictors}
        total, inputs = 0.0, self.copies.inputs(point)
        for site, (message, _) in numbers.reading.likelihoods.items():
            if site not in moving:
                family = _family(site, message, (), (), (), message["value"].shape, inputs)
                total += float(family.log_density(family.constants, []).sum())
        return replace(numbers, constant=numbers.constant + total) if total else numbers

    def _part(self, block: Block, reading: Reading) -> tuple[PriorPart, str]:
        if not block.tied:
            (law,) = sites_of(reading, [block.name])
            loc, scale = (x.expand(block.shape).reshape(-1).cpu().numpy() for x in (law.loc, law.scale))
            part = PriorPart(block.size, mean=loc)
            part.add(np.arange(block.size), np.arange(block.size), scale**-2.0)
            part.constant = float(-np.log(scale).sum() - 0.5 * block.size * math.log(2 * math.pi))
            return part, "plain"
        prior = reading.priors[block.name]
        if is_hard(prior):
            return hard_part(prior), "hard"
        return copies_part(prior), "copies"

    def _shift(self, modes: Sequence[str], levels: dict[str, Level]) -> np.ndarray:
        shift = np.zeros(self.copies.num_x)
        for block, mode in zip(self.copies.blocks, modes, strict=True):
            if mode == "hard" and levels[block.name].known:
                labels = self.copies.tied[block.name].infer["bayestie"]["tie"].labels.numpy()
                shift[block.slice] = levels[block.name].loc[labels].ravel()
        return shift

    def _likelihood(self, predictor: Predictor, reading: Reading, point: int) -> Likelihood:
        message, parameters = reading.likelihoods[predictor.site]
        base = base_distribution(message["fn"])
        link = link_of(type(base).arg_constraints[predictor.name])
        still = tuple(n for n in parameters if n != predictor.name)
        family = _family(
            predictor.site,
            message,
            (predictor.name,),
            (link,),
            still,
            predictor.shape,
            self.copies.inputs(point),
        )
        natural = family.natural()
        if natural is None:
            raise NotSparse(
                f"observed site '{predictor.site}' is {type(base).__name__} of {predictor.name}: "
                "served are Bernoulli and Binomial of logits, Poisson, and Normal"
            )
        size = predictor.shape.numel()
        weight = torch.ones_like(natural.target) if natural.weight is None else natural.weight
        return Likelihood(
            predictor.rows,
            natural.cumulant,
            natural.target.reshape(size).numpy(),
            weight.reshape(size).numpy(),
            float(natural.constant.sum()),
            natural.is_gaussian,
        )

    # -- results -------------------------------------------------------------------------------------------

    def full(self, structure: Structure, numbers: Numbers, x: np.ndarray) -> np.ndarray:
        """Reduced variables (batch, n) -> copies and Gaussian latents (batch, num_x)."""
        out = x if structure.is_whole else np.asarray((structure.expand @ x.T).T)
        return out + numbers.shift if numbers.shift.any() else out

    def levels(self, structure: Structure, numbers: Numbers, x: np.ndarray) -> dict[str, np.ndarray]:
        """Levels (batch, c, E) of the tied statements whose level is a latent."""
        found = {}
        for block, mode, start in zip(self.copies.blocks, structure.modes, structure.starts, strict=True):
            if not block.tied:
                continue
            level = numbers.levels[block.name]
            tie = self.copies.tied[block.name].infer["bayestie"]["tie"]
            shape = (len(x), *level.loc.shape)
            if level.known:
                found[block.name] = np.broadcast_to(level.loc, shape).copy()
                continue
            if mode == "hard":
                found[block.name] = x[:, start : start + level.loc.size].reshape(shape).copy()
                continue
            copies = x[:, start : start + block.size].reshape(len(x), -1, block.num_events)
            out = np.empty(shape)
            hub = start + block.size
            for number, (part, own) in enumerate(zip(tie.components, tie.layout.copies, strict=True)):
                if part.hub:
                    out[:, number] = x[:, hub : hub + block.num_events]
                    hub += block.num_events
                elif part.anchored:
                    out[:, number] = copies[:, int(own[0])]
                elif len(own) == tie.num_copies:
                    out[:, number] = copies.mean(1)
                else:
                    out[:, number] = copies[:, own.numpy()].mean(1)
            found[block.name] = out
        return found


def _family(
    site: str,
    message: Any,
    names: tuple[str, ...],
    links: tuple[Any, ...],
    still: Sequence[str],
    shape: Sequence[int],
    inputs: Any,
) -> Family:
    """One site's likelihood with its constants at one point, (1, M) each."""
    base = base_distribution(message["fn"])
    mask = True if message["mask"] is None else message["mask"]
    given = [message["value"], message["scale"], mask, inputs.weights.get(site, 1.0)]
    given += [getattr(base, name) for name in still]
    shape = torch.Size(np.broadcast_shapes(tuple(shape), base.batch_shape))
    keys = ("<value>", "<scale>", "<mask>", "<weight>", *still)
    constants = {
        key: torch.as_tensor(value).to(torch.float64).expand(shape).reshape(1, -1)
        for key, value in zip(keys, given, strict=True)
    }
    return Family(site, type(base), names, links, constants, shape)


def build_sparse_density(program: LaneProgram) -> tuple[SparseDensity | None, str]:
    """The sparse route, or None and why it does not serve this model."""
    try:
        return SparseDensity(program), ""
    except NotSparse as error:
        return None, str(error)
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        # The model has been run with copies in place of what it states, and may fail in any way at that: it
        # is not served, and the error says why.
        return None, f"{type(error).__name__}: {first_line(error)}"
