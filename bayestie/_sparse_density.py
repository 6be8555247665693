"""The log joint of a sweep in the coordinates of the copies: sparse prior, likelihoods of sparse predictors.

x holds the copies of every tied statement, the hubs' levels and the Gaussian latents; eta = A x + b. At a
point of the sweep (and, where a few latents h stand outside x, at a value of h)

    log p(y, x, h) = log p(h) + log N(x; m, P, directions) + sum_i target_i eta_i - weight_i A(eta_i) + const.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch
from torch import Tensor

from bayestie._copy_coordinates import Block, CopyProgram, NotSparse, Reading, sites_of
from bayestie._families import Cumulant, Family, link_of
from bayestie._messages import base_distribution
from bayestie._program import LaneProgram
from bayestie._sparse_factor import NotPositive, choose_pattern, lower_pattern
from bayestie._sparse_map import NotSparseMap, find_map
from bayestie._sparse_prior import Level, PriorPart, copies_part, hard_part, is_hard, level_of

MAX_PRODUCTS = 60_000_000  # pairs of entries in the rows of A
MAX_DIRECTIONS = 400


@dataclass(frozen=True)
class Predictor:
    """A likelihood site and the one parameter of it that x moves."""

    site: str
    name: str
    shape: torch.Size
    rows: slice


@dataclass(frozen=True)
class Likelihood:
    """log p of one site = sum of target eta - weight A(eta) + constant, at one point and h."""

    rows: slice
    cumulant: Cumulant
    target: np.ndarray
    weight: np.ndarray
    constant: float
    is_gaussian: bool

    def value(self, eta: np.ndarray) -> np.ndarray:
        """Elementwise, without the constant; eta (..., M) of this site."""
        size = self.cumulant.value(torch.from_numpy(eta)).numpy()
        return self.target * eta - self.weight * size

    def slope(self, eta: np.ndarray) -> np.ndarray:
        return self.target - self.weight * mean_slope(self.cumulant, eta)

    def curvature(self, eta: np.ndarray) -> np.ndarray:
        return self.weight * self.cumulant.curvature(torch.from_numpy(eta)).numpy()


@dataclass(frozen=True)
class Numbers:
    """Everything that the strength and h decide: prior and likelihood of one structure."""

    precision: np.ndarray  # P on the structure's pattern
    prior: Any  # P itself
    mean: np.ndarray  # m
    variances: np.ndarray  # D of each direction
    constant: float
    offset: np.ndarray  # of the predictors, known levels included
    shift: np.ndarray  # of x: known levels where sigma = 0
    likelihoods: tuple[Likelihood, ...]
    levels: dict[str, Level]
    reading: Reading

    @property
    def is_gaussian(self) -> bool:
        return all(part.is_gaussian for part in self.likelihoods)


def mean_slope(cumulant: Cumulant, eta: np.ndarray) -> np.ndarray:
    """A'(eta)."""
    with np.errstate(over="ignore"):
        out = torch.from_numpy(eta).clone()
        cumulant.value_and_slope_(out, torch.empty_like(out))
    return cumulant.limit - out.numpy()


class Structure:
    """Points of a sweep with the same variables: which copies are free, one hard parameter, or fixed.

    ``variables`` x are reduced: copies at sigma = 0 are their levels. x_full = expand x + shift.
    """

    def __init__(self, density: "SparseDensity", parts: Sequence[PriorPart], modes: Sequence[str], seed: int):
        copies = density.copies
        self.modes, self.starts = tuple(modes), []
        start, rows, cols, blocks = 0, [], [], []
        for block, part, mode in zip(copies.blocks, parts, modes, strict=True):
            self.starts.append(start)
            blocks.append(slice(start, start + part.size))
            if mode == "hard" and part.size:
                labels = copies.tied[block.name].infer["bayestie"]["tie"].labels.numpy()
                index = labels[:, None] * block.num_events + np.arange(block.num_events)
                place = np.arange(block.start, block.start + block.size)
                rows.append(place)
                cols.append(start + index.ravel())
            elif mode != "hard":
                rows.append(np.arange(block.start, block.start + block.size))
                cols.append(np.arange(start, start + block.size))
            start += part.size
        self.size = start
        row, col = (np.concatenate(x) if x else np.zeros(0, int) for x in (rows, cols))
        self.expand: Any = sp.csr_array((np.ones(len(row)), (row, col)), shape=(copies.num_x, start))
        self.is_whole = self.expand.shape == (start, start) and bool((col == np.arange(start)).all())
        self.map: Any = sp.csr_array(density.map @ self.expand)
        self.map.sum_duplicates()
        self.transposed: Any = sp.csr_array(self.map.T)
        self._lay_out_precision(parts, blocks)
        self._lay_out_directions(parts)

    def _lay_out_precision(self, parts: Sequence[PriorPart], blocks: list[slice]) -> None:
        prior_row = np.concatenate(
            [r + s for p, s in zip(parts, self.starts, strict=True) for r in p.row] or [np.zeros(0, int)]
        ).astype(np.int64)
        prior_col = np.concatenate(
            [c + s for p, s in zip(parts, self.starts, strict=True) for c in p.col] or [np.zeros(0, int)]
        ).astype(np.int64)
        counts = np.diff(self.map.indptr)
        if int((counts.astype(np.int64) ** 2).sum()) > MAX_PRODUCTS:
            raise NotSparse("observations depend on too many copies each")
        observation, left, right = _pairs(self.map)
        gram_row, gram_col = (np.maximum, np.minimum)
        places_row = gram_row(self.map.indices[left], self.map.indices[right])
        places_col = gram_col(self.map.indices[left], self.map.indices[right])
        row, col, keys = lower_pattern(
            self.size, np.concatenate([prior_row, places_row]), np.concatenate([prior_col, places_col])
        )
        self.pattern = choose_pattern(self.size, row, col, blocks)
        self._prior_place = _find(keys, self.size, prior_row, prior_col)
        place = _find(keys, self.size, places_row, places_col)
        products = self.map.data[left] * self.map.data[right]
        # Curvature of the likelihood is linear in its weights: one sparse product per Newton step.
        self._gram = sp.csr_array((products, (place, observation)), shape=(len(keys), self.map.shape[0]))

    def _lay_out_directions(self, parts: Sequence[PriorPart]) -> None:
        found = [
            (places + start, weight)
            for part, start in zip(parts, self.starts, strict=True)
            for places, weight in part.directions
        ]
        if len(found) > MAX_DIRECTIONS:
            raise NotSparse(f"it has {len(found)} levels that are means, at most {MAX_DIRECTIONS} may be")
        # Where data leave the sum of all copies of a component open, P + A^T W A is singular without its
        # level's prior: a pin on one copy, taken off again as a direction of negative variance.
        diagonal = self.curvature(np.ones(self.map.shape[0]))
        held = self._along(found, diagonal)
        self.pins = [int(found[i][0][0]) for i in range(len(found))] if held else []
        indices = [places for places, _ in found] + [np.array([pin]) for pin in self.pins]
        weights = [np.full(len(p), w) for p, w in found] + [np.ones(1) for _ in self.pins]
        columns = np.repeat(np.arange(len(indices)), [len(p) for p in indices])
        row = np.concatenate(indices) if indices else np.zeros(0, int)
        data = np.concatenate(weights) if weights else np.zeros(0)
        self.directions: Any = sp.csc_array((data, (row, columns)), shape=(self.size, len(indices)))
        self._pin_place = np.array([self._diagonal_place(pin) for pin in self.pins], dtype=np.int64)

    def _along(self, found: list[tuple[np.ndarray, float]], gram: np.ndarray) -> bool:
        """Whether constant components are (nearly) not held by the data."""
        if not found:
            return False
        row, col = self.pattern.row, self.pattern.col
        columns = np.repeat(np.arange(len(found)), [len(p) for p, _ in found])
        ones = sp.csr_array(
            (np.ones(len(columns)), (np.concatenate([p for p, _ in found]), columns)),
            shape=(self.size, len(found)),
        )
        lower = sp.csr_array((gram, (row, col)), shape=(self.size, self.size))
        half = lower @ ones
        both = (ones.T @ half).toarray()
        diagonal = sp.dia_array((gram[row == col][None], [0]), shape=(self.size, self.size))
        full = both + both.T - (ones.T @ (diagonal @ ones)).toarray()
        scale = np.sqrt(full.diagonal())
        if (scale == 0).any():
            return True
        return bool(np.linalg.eigvalsh(full / scale[:, None] / scale)[0] < 1e-6)

    def _diagonal_place(self, variable: int) -> int:
        return int(np.flatnonzero((self.pattern.row == variable) & (self.pattern.col == variable))[0])

    def curvature(self, weights: np.ndarray) -> np.ndarray:
        """A^T W A on the pattern."""
        return self._gram @ weights

    def prior_precision(self, parts: Sequence[PriorPart]) -> np.ndarray:
        values = np.concatenate([v for p in parts for v in p.value] or [np.zeros(0)])
        return np.bincount(self._prior_place, values, len(self.pattern.row))

    def matrix(self, data: np.ndarray) -> sp.csr_array:
        """The whole symmetric matrix with these entries of its lower triangle."""
        place, indices, starts = self._whole
        return sp.csr_array((data[place], indices, starts), shape=(self.size, self.size))

    @cached_property
    def _whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        row, col = self.pattern.row, self.pattern.col
        off = np.flatnonzero(row != col)
        places = np.concatenate([np.arange(len(row)), off]) + 1.0
        shape = (self.size, self.size)
        both = sp.coo_array((places, (np.r_[row, col[off]], np.r_[col, row[off]])), shape=shape).tocsr()
        both.sort_indices()
        return both.data.astype(np.int64) - 1, both.indices, both.indptr


class Gaussian:
    """N(mean, Q^-1) with Q = P + A^T W A + U D^-1 U^T, by Woodbury's formula around the sparse part.

    Q^-1 = S - S U G U^T S with S the sparse inverse, C = U^T S U, G = (D + C)^-1; D = 0 is a constraint.
    """

    def __init__(self, structure: Structure, numbers: Numbers, weights: np.ndarray, mean: np.ndarray):
        self.structure, self.mean, self.weights = structure, mean, weights
        data = self.unpinned = numbers.precision + structure.curvature(weights)
        variances = numbers.variances
        if structure.pins:
            diagonal = data[structure.pattern.row == structure.pattern.col]
            pin = np.full(len(structure.pins), float(np.median(diagonal)))
            data = data.copy()
            np.add.at(data, structure._pin_place, pin)
            variances = np.concatenate([variances, -1.0 / pin])
        self.data, self.variances = data, variances
        self.factor = structure.pattern.factor(data)
        self.log_det = self.factor.log_det
        if not structure.directions.shape[1]:
            self.response = None
            return
        u = structure.directions
        self.response = self.factor.solve(u.toarray(order="F"))  # S U
        inner = u.T @ self.response
        inner = 0.5 * (inner + inner.T)
        both = np.diag(variances) + inner
        sign, log_det = np.linalg.slogdet(both)
        negative = int((variances < 0).sum())
        if sign * (-1) ** negative <= 0:
            raise NotPositive
        self.inverse = np.linalg.inv(both)
        self.log_det += log_det - float(np.log(np.abs(variances[variances != 0])).sum())
        lower = np.linalg.cholesky(inner)
        shrink = np.eye(len(inner)) - lower.T @ self.inverse @ lower
        values, vectors = np.linalg.eigh(0.5 * (shrink + shrink.T))
        half = np.eye(len(inner)) - (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
        back = scipy.linalg.solve_triangular(lower, half, lower=True, trans=1)
        self.correction = scipy.linalg.solve_triangular(lower, back.T, lower=True, trans=1).T

    def solve(self, right: np.ndarray) -> np.ndarray:
        out = self.factor.solve(right)
        if self.response is not None:
            out = out - self.response @ (self.inverse @ (self.response.T @ right))
        return out

    def deviations(self, noise: np.ndarray) -> np.ndarray:
        """Standard normals (n, batch) to draws about the mean."""
        out = self.factor.whiten_back(noise)
        if self.response is not None:
            out -= self.response @ (self.correction @ (self.structure.directions.T @ out))
        return out

    def draw(self, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`deviations` and their `square`, which costs nothing here: (n, batch) and (batch,)."""
        out = self.factor.whiten_back(noise)
        square = np.einsum("nb,nb->b", noise, noise)
        if self.response is None:
            return out, square
        u = self.structure.directions
        along = u.T @ out
        moved = self.correction @ along
        out -= self.response @ moved
        inner = u.T @ self.response
        square = square - 2 * (moved * along).sum(0) + (moved * (inner @ moved)).sum(0)
        soft = self.variances != 0
        at = (along - inner @ moved)[soft]
        return out, square + (at**2 / self.variances[soft, None]).sum(0)

    def square(self, step: np.ndarray) -> np.ndarray:
        """(x - mean)^T Q (x - mean) of columns (n, batch); directions of known value have no part in it."""
        total = (step * (self.structure.matrix(self.data) @ step)).sum(0)
        if self.response is not None:
            soft = self.variances != 0
            at = (self.structure.directions.T @ step)[soft]
            total = total + (at**2 / self.variances[soft, None]).sum(0)
        return total

    def log_density(self, step: np.ndarray) -> np.ndarray:
        """Of mean + step (n, batch); the normaliser of the variables less their constraints."""
        size = len(self.mean)
        return -0.5 * self.square(step) + 0.5 * self.log_det - 0.5 * size * math.log(2 * math.pi)


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
            self.structures[key] = Structure(self, parts, modes, self.program.seed)
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


def _find(keys: np.ndarray, size: int, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    low, high = np.maximum(row, col), np.minimum(row, col)
    return np.searchsorted(keys, low.astype(np.int64) * size + high)


def _pairs(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and both entries of every unordered pair of entries of a row, an entry with itself among them."""
    counts = np.diff(matrix.indptr)
    rows, lefts, rights = [], [], []
    for count in np.unique(counts):
        if count == 0:
            continue
        own = np.flatnonzero(counts == count)
        left, right = np.tril_indices(count)
        first = matrix.indptr[own][:, None]
        rows.append(np.repeat(own, len(left)))
        lefts.append((first + left).ravel())
        rights.append((first + right).ravel())
    if not rows:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0, int)
    return np.concatenate(rows), np.concatenate(lefts), np.concatenate(rights)


def build_sparse_density(program: LaneProgram) -> tuple[SparseDensity | None, str]:
    """The sparse route, or None and why it does not serve this model."""
    try:
        return SparseDensity(program), ""
    except NotSparse as error:
        return None, str(error)
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
