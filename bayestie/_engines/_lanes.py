"""NUTS over many lanes at once, as an asynchronous state machine: one leapfrog per tick in every lane.

A lane whose trajectory ends starts the next one in the next tick, so lanes never wait for one another's tree
depth. Every lane of a round draws the same number of times: stopping all lanes at one tick would keep short
trajectories and drop long ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from bayestie._engines._axis_map import AxisMap
from bayestie._engines._centring import Centring
from bayestie._engines._laplace_fit import LaplaceFit
from bayestie._engines._protocol import Task
from bayestie._engines._trajectories import MAX_DEPTH, STATISTICS, Trajectories

if TYPE_CHECKING:
    from bayestie._engines._native_affine import AffineTicks, NativeAffine, SparseRows

Slots = tuple[Tensor, Tensor, Tensor, Tensor]  # the last arguments of `Trajectories.record`
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

TARGET_ACCEPT = 0.8
TICKS_PER_BLOCK = 32  # noise is drawn, and finished lanes are dropped, once per block
TICKS_PER_STEP = 4  # the step size is adapted so often
MOMENTA = 8  # trajectories that a lane is expected to start in a block, at most


@dataclass
class Round:
    """Draws of one round: whitened positions (P, C, N, D), the rest (P, C, N)."""

    z: Tensor
    stats: dict[str, Tensor]


class StepSize:
    """Step size by stochastic approximation of its logarithm, pooled over the chains of a point.

    Robbins-Monro with gain n^-0.6 and averaging of the later iterates (Polyak and Juditsky 1992). Pooled
    chains update several times in the span of one trajectory; dual averaging with its usual constants
    then swings over two orders of magnitude, and every swing down is a deep tree in all lanes.
    """

    def __init__(self, initial: Tensor):
        self.log_step = initial.log()
        self.restart()

    def restart(self, count: int = 0) -> None:
        """Forget the average; ``count`` trajectories are taken to be behind the step as it stands."""
        self.count = torch.full_like(self.log_step, count)
        self.weight = torch.zeros_like(self.log_step)
        self.average = self.log_step.clone()

    def update(self, index: Tensor, tally: Tensor) -> None:
        """``tally`` (P, 2): trajectories that ended since the last update in all chains of the points
        ``index`` (P,), and the sum of their acceptance rates."""
        number, accepted = tally.unbind(1)
        mean = accepted / number.clamp(min=1)
        count = self.count[index] + number
        # Of as many updates as trajectories ended, were they one after another; of a jump, no more.
        gain = (1.5 * number * count.clamp(min=1) ** -0.6).clamp(max=1.0)
        log_step = self.log_step[index] + torch.where(number > 0, gain * (mean - TARGET_ACCEPT), 0.0)
        # The average forgets its beginning: weight n on the n-th iterate.
        weight = count * (number > 0)
        total = self.weight[index] + weight
        average = self.average[index]
        self.average[index] = average + weight / total.clamp(min=1e-300) * (log_step - average)
        self.count[index], self.log_step[index], self.weight[index] = count, log_step, total

    def finish(self) -> None:
        self.log_step = self.average.clone()


@dataclass
class Coordinates:
    """The sampler's coordinates z of every point: mode + factor T(scale z), without a map T(x) = x.

    That is u, or where there is a centring the coordinates that it turns into u.
    """

    task: Task
    fit: LaplaceFit
    scale: Tensor  # (P, D)
    map: AxisMap | None
    rows: "SparseRows | None" = None  # the likelihoods, where ticks are compiled
    native: "NativeAffine | None" = None  # made of them about the fit
    centring: Centring | None = None

    @property
    def points(self) -> Tensor:
        return self.fit.points

    def __post_init__(self) -> None:
        if self.rows is not None and (self.native is None or self.native.fit is not self.fit):
            from bayestie._engines._native_affine import native_affine  # the compiler takes long to import

            self.native = native_affine(self.rows, self.fit)

    def take(self, index: Tensor) -> "Coordinates":
        map = None if self.map is None else self.map.take(index)
        fit, scale = self.fit.take(index), self.scale[index]
        centring = None if self.centring is None else self.centring.take(index)
        native = None if self.native is None else self.native.take(index, fit)
        rows = None if native is None else native.rows
        return Coordinates(self.task, fit, scale, map, rows, native, centring)

    def to_position(self, z: Tensor) -> Tensor:
        """(P, batch, D) -> (P, batch, num_latent)."""
        straight = self.straight(z)
        return straight if self.centring is None else self.centring.to_latent(straight)

    def straight(self, z: Tensor) -> Tensor:
        """mode + factor T(scale z), (P, batch, D)."""
        scaled = z * self.scale.unsqueeze(1)
        return self.fit.to_position(scaled if self.map is None else self.map(scaled)[0])

    def evaluate_straight(self, straight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log density of u, and of `straight` (P, batch, D) with its gradient by that."""
        density, points = self.task.density, self.fit.points
        if self.centring is None:
            value, grad = density.value_and_grad(points, straight)
            return value, value, grad
        value, grad = density.value_and_grad(points, self.centring.to_latent(straight))
        return value, *self.centring.pull_back(straight, value, grad)

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log density of u (P, batch); that of z but for a constant, and its gradient by z."""
        scaled, slope, bend = z * self.scale.unsqueeze(1), None, None
        if self.map is not None:
            scaled, slope, bend = self.map(scaled)
        value, own, grad = self.evaluate_straight(self.fit.to_position(scaled))
        grad = torch.bmm(grad, self.fit.factor)
        if slope is not None and bend is not None:
            own, grad = own + slope.log().sum(-1), grad * slope + bend / slope
        return value, own, grad * self.scale.unsqueeze(1)

    def whole_ticks(self, state: Trajectories, uniforms: Tensor, momenta: "Momenta") -> "AffineTicks | None":
        """The ticks of a block, compiled where likelihoods are natural ones of affine predictors."""
        if self.native is None:
            return None
        from bayestie._engines._native_affine import AffineTicks

        return AffineTicks(self.native.density(self.scale, self.map), state, uniforms, momenta)


class WholeTicks(Protocol):
    """Ticks of a block, compiled whole."""

    def run(self, until: int, steps: Tensor, pending: Tensor, tally: Tensor, slots: Slots) -> int:
        """On to tick ``until``; the leapfrogs taken. The rest as in `Lanes`."""
        ...


class Whitened(Protocol):
    """Coordinates that the lanes move in, in which posteriors are about standard normal."""

    task: Task

    @property
    def points(self) -> Tensor:
        """Those that are left."""
        ...

    def take(self, index: Tensor) -> "Whitened":
        """Some of the points."""
        ...

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Coordinates.evaluate`."""
        ...

    def whole_ticks(self, state: Trajectories, uniforms: Tensor, momenta: "Momenta") -> WholeTicks | None:
        """The ticks of a block, where they are compiled."""
        ...


class Lanes:
    """The state machine for P x C lanes; flat lane axis L = P C. Lanes that are done leave the batch."""

    def __init__(
        self,
        coordinates: Whitened,
        z: Tensor,
        rows: Tensor,
        stream: int,
        report: Callable[[int], None],
        longer: Tensor | None = None,
    ):
        self.coordinates, self.stream, self.report = coordinates, stream, report
        self.num_points, self.num_chains, self.dim = z.shape
        # Times the step of a point: what its chains (C,) take.
        self.longer = z.new_ones(self.num_chains) if longer is None else longer
        self.z = z.reshape(-1, self.dim).clone()
        # What is still in the batch: the points' rows in the step size, and of every lane its number.
        self.rows = rows
        self.lane = torch.arange(len(self.z), device=z.device)
        self.ticks = 0
        self.leapfrogs = 0
        self.useful = 0

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities of u and z, (L, 2), and the gradient of the latter, (L, D)."""
        value, own, grad = self.coordinates.evaluate(z.reshape(len(self.rows), -1, self.dim))
        return torch.stack([value.reshape(-1), own.reshape(-1)], 1), grad.reshape(-1, self.dim)

    def run(self, num_draws: int, step: StepSize, adapt: bool, max_depth: int = MAX_DEPTH) -> Round:
        """``num_draws`` trajectories in every lane."""
        total = len(self.z)
        self.out_z = self.z.new_zeros(total, num_draws + 1, self.dim)  # the last slot takes what is not kept
        self.out = self.z.new_zeros(total, num_draws + 1, len(STATISTICS))
        self.count = torch.zeros(total, dtype=torch.long, device=self.z.device)
        # Lanes whose next tick begins a trajectory.
        self.pending = torch.ones(total, dtype=torch.bool, device=self.z.device)
        # Of wanted trajectories that ended since the step size was adapted: how many, and their acceptance.
        self.tally = self.z.new_zeros(total, 2)
        state = trajectories(self.z, *self._evaluate(self.z), max_depth)
        while True:
            for _ in self._block(state, step, TICKS_PER_STEP if adapt else TICKS_PER_BLOCK):
                if adapt:
                    step.update(self.rows, self.tally.view(len(self.rows), -1, 2).sum(1))
                self.tally.zero_()
            self.ticks += TICKS_PER_BLOCK
            busy = self.count < num_draws
            self.report(total * num_draws - int((num_draws - self.count[busy]).sum()))
            if not bool(busy.any()):
                break
            kept = self._compact(busy)
            if kept is not None:
                state.keep(kept)
                self.pending, self.tally = self.pending[kept], self.tally[kept]
                self.count = torch.where(busy[kept], self.count[kept], num_draws)
        # Where a lane stands at some tick is biased towards long trajectories; at its n-th draw it is not.
        self.z = self.out_z[:, num_draws - 1]
        shape = (self.num_points, self.num_chains, num_draws)
        kept_stats = self.out[:, :num_draws].reshape(*shape, -1).unbind(-1)
        return Round(
            self.out_z[:, :num_draws].reshape(*shape, self.dim),
            dict(zip(STATISTICS, kept_stats, strict=True)),
        )

    def _block(self, state: Trajectories, step: StepSize, every: int) -> Iterator[None]:
        """A block of ticks, with a stop after ``every`` few where the step size may be adapted."""
        momenta, uniforms = self._momenta(), self._uniforms()
        compiled = self.coordinates.whole_ticks(state, uniforms, momenta)
        num_draws = self.out_z.shape[1] - 1
        for begin in range(0, TICKS_PER_BLOCK, every):
            end, steps = begin + every, self._steps(step)
            if compiled is not None:
                leapfrogs = compiled.run(end, steps, self.pending, self.tally, self._slots())
                self.leapfrogs += leapfrogs
                self.useful += leapfrogs
                yield
                continue
            for t in range(begin, end):
                begins = self.pending.nonzero().squeeze(1)
                state.start(begins, momenta.take(begins), uniforms[t, :, 0], steps)
                z, p = state.propose()
                ended = state.advance(z, p, *self._evaluate(z), uniforms[t])
                self.leapfrogs += len(z)
                self.useful += int((self.count < num_draws).sum())
                kept, rate = state.record(ended, *self._slots())
                self.tally.index_add_(0, ended, torch.stack([kept.to(rate), kept * rate], 1))
                self.pending.fill_(False).index_fill_(0, ended, True)
            yield

    def _slots(self) -> Slots:
        """Of every lane its number and its draws so far; positions and statistics of the round."""
        return self.lane, self.count, self.out_z, self.out

    def _compact(self, busy: Tensor) -> Tensor | None:
        """Leave out points and lanes that are done, where that makes the batch smaller by a quarter.

        A point keeps as many lanes as the one with most busy lanes needs, its busy ones first.
        """
        table = busy.reshape(len(self.rows), -1)
        counts = table.sum(1)
        width = int(counts.max())
        points = torch.nonzero(counts).squeeze(1)
        if len(points) * width > 0.75 * busy.numel():
            return None
        first = table[points].long().argsort(dim=1, descending=True, stable=True)[:, :width]
        lanes = (points.unsqueeze(1) * table.shape[1] + first).reshape(-1)
        self.rows, self.lane = self.rows[points], self.lane[lanes]
        self.coordinates = self.coordinates.take(points)
        return lanes

    def _steps(self, step: StepSize) -> Tensor:
        steps = step.log_step[self.rows].exp().repeat_interleave(len(self.lane) // len(self.rows))
        return steps * self.longer[self.lane % self.num_chains]

    def _uniforms(self) -> Tensor:
        """(ticks, L, 4) of the block that begins now, keyed by (seed, stream, point, tick)."""
        return self._noise(self.ticks, 0, lambda rng, shape: rng.random(shape), TICKS_PER_BLOCK, 4)

    def _momenta(self) -> "Momenta":
        begin = self.ticks

        def normals(chunk: int, number: int) -> Tensor:
            return self._noise(
                begin, 1 + chunk, lambda rng, shape: rng.standard_normal(shape), number, self.dim
            )

        # To find out that more are needed would make an accelerator wait: there it starts with the most.
        number = MOMENTA if self.z.device.type == "cpu" else TICKS_PER_BLOCK
        return Momenta(normals, number, len(self.lane))

    def _noise(self, begin: int, key: int, draw: Draw, number: int, width: int) -> Tensor:
        """(number, L, width): of every point by a generator of its own, for the block that began then."""
        table = (self.lane % self.num_chains).reshape(len(self.rows), -1).cpu().numpy()
        out = np.empty((number, *table.shape, width))
        task, points = self.coordinates.task, self.coordinates.points.tolist()
        for i, (point, chains) in enumerate(zip(points, table, strict=True)):
            rng = task.generator(201, self.stream, point, begin, key)
            # Of all chains, those that are left: what a lane sees is the same whoever has gone.
            out[:, i] = draw(rng, (number, self.num_chains, width))[:, chains]
        return torch.as_tensor(out).flatten(1, 2).to(self.z)


class Momenta:
    """Standard normals for the trajectories that lanes start within a block, drawn as they are needed.

    Args:
        normals: makes a chunk of them (number, L, D), given its number among the chunks and how many.
        number: in a chunk.
        lanes: L.
    """

    def __init__(self, normals: Callable[[int, int], Tensor], number: int, lanes: int):
        self.normals, self.number, self.chunks = normals, number, 1
        self.ready = normals(0, number)
        self.used = torch.zeros(lanes, dtype=torch.long, device=self.ready.device)

    def take(self, rows: Tensor) -> Tensor:
        """The next of each of these lanes, (rows, D)."""
        at = self.used.index_select(0, rows)
        self.used.index_add_(0, rows, torch.ones_like(at))
        while len(self.ready) < TICKS_PER_BLOCK and len(at) and int(at.max()) >= len(self.ready):
            self.extend()
        return self.ready[at, rows]

    def extend(self) -> None:
        """Have more ready."""
        self.ready = torch.cat([self.ready, self.normals(self.chunks, self.number)])
        self.chunks += 1


def trajectories(z: Tensor, values: Tensor, grad: Tensor, max_depth: int) -> Trajectories:
    """The state machine for the device that ``z`` is on."""
    if z.device.type != "cpu":
        return Trajectories(z, values, grad, max_depth)
    # Here, because the compiler takes half a second to import and `laplace` needs none of it.
    from bayestie._engines._native import NativeTrajectories

    return NativeTrajectories(z, values, grad, max_depth)
