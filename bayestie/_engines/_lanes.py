"""NUTS over many lanes at once, as an asynchronous state machine: one leapfrog per tick in every lane.

Multinomial trajectories with biased progressive sampling (Betancourt 2017, A Conceptual Introduction to
Hamiltonian Monte Carlo, appendix A), built iteratively with O(log) checkpoints (Phan, Pradhan and Jankowiak
2019, Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro; Lao and Dillon
2019, Unrolled No-U-Turn Sampler). A lane whose trajectory ends starts the next one in the next tick, so
lanes never wait for one another's tree depth. Every lane of a round draws the same number of times:
stopping all lanes at one tick would keep short trajectories and drop long ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bayestie._engines._axis_map import AxisMap
from bayestie._engines._laplace_fit import LaplaceFit
from bayestie._engines._protocol import Task

MAX_DEPTH = 10
MAX_ENERGY_ERROR = 1000.0
TARGET_ACCEPT = 0.8
TICKS_PER_BLOCK = 32  # noise is drawn, and finished lanes are dropped, once per block
STATISTICS = ("lp", "energy", "acceptance_rate", "step_size", "n_steps", "tree_depth", "diverging")


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

    def update(self, index: Tensor, accept: Tensor, ended: Tensor) -> None:
        """accept and ended are (P, C), ``index`` (P,) says of which points: a point learns from the chains
        whose trajectory ended this tick."""
        number = ended.sum(1)
        mean = torch.where(ended, accept, 0.0).sum(1) / number.clamp(min=1)
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
    """The sampler's coordinates z of every point: u = mode + factor T(scale z), without a map T(x) = x."""

    task: Task
    fit: LaplaceFit
    scale: Tensor  # (P, D)
    map: AxisMap | None

    def take(self, index: Tensor) -> "Coordinates":
        kept = None if self.map is None else self.map.take(index)
        return Coordinates(self.task, self.fit.take(index), self.scale[index], kept)

    def to_position(self, z: Tensor) -> Tensor:
        """(P, batch, D) -> (P, batch, num_latent)."""
        scaled = z * self.scale.unsqueeze(1)
        return self.fit.to_position(scaled if self.map is None else self.map(scaled)[0])

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log density of u (P, batch); that of z but for a constant, and its gradient by z."""
        scaled, slope, bend = z * self.scale.unsqueeze(1), None, None
        if self.map is not None:
            scaled, slope, bend = self.map(scaled)
        value, grad = self.task.density.value_and_grad(self.fit.points, self.fit.to_position(scaled))
        grad, own = torch.bmm(grad, self.fit.factor), value
        if slope is not None and bend is not None:
            own, grad = value + slope.log().sum(-1), grad * slope + bend / slope
        return value, own, grad * self.scale.unsqueeze(1)


class Whitened(Protocol):
    """Coordinates that the lanes move in, in which posteriors are about standard normal."""

    task: Task
    fit: LaplaceFit  # of the points that are left

    def take(self, index: Tensor) -> "Whitened":
        """Some of the points."""
        ...

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Coordinates.evaluate`."""
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
    ):
        self.coordinates, self.stream, self.report = coordinates, stream, report
        self.num_points, self.num_chains, self.dim = z.shape
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
        out_z = self.z.new_zeros(total, num_draws + 1, self.dim)  # the last slot takes what is not kept
        out = self.z.new_zeros(total, num_draws + 1, len(STATISTICS))
        count = torch.zeros(total, dtype=torch.long, device=self.z.device)
        state = Trajectories(self.z, *self._evaluate(self.z), max_depth)
        normals, uniforms = self._noise()
        state.start(self.lane, normals[0], uniforms[0, :, 0], self._steps(step))
        while True:
            for t in range(1, TICKS_PER_BLOCK + 1):
                z, p = state.propose()
                ended = state.advance(z, p, *self._evaluate(z), uniforms[t])
                self.ticks += 1
                self.leapfrogs += len(z)
                busy = count < num_draws
                self.useful += int(busy.sum())
                statistics = state.statistics(ended)
                kept = busy.index_select(0, ended)
                slot = torch.where(kept, count.index_select(0, ended), num_draws)
                place = (num_draws + 1) * self.lane.index_select(0, ended) + slot
                out_z.view(-1, self.dim).index_copy_(
                    0, place, state.last[:, : self.dim].index_select(0, ended)
                )
                out.view(-1, len(STATISTICS)).index_copy_(0, place, statistics)
                if adapt:
                    step.update(self.rows, *self._acceptance(ended, kept, statistics[:, 2]))
                count.index_add_(0, ended, kept.long())
                state.start(ended, normals[t], uniforms[t, :, 0], self._steps(step))
            busy = count < num_draws
            self.report(total * num_draws - int((num_draws - count[busy]).sum()))
            if not bool(busy.any()):
                break
            kept_lanes = self._compact(busy)
            if kept_lanes is not None:
                state.keep(kept_lanes)
                count = torch.where(busy[kept_lanes], count[kept_lanes], num_draws)
            normals, uniforms = self._noise()
        # Where a lane stands at some tick is biased towards long trajectories; at its n-th draw it is not.
        self.z = out_z[:, num_draws - 1]
        shape = (self.num_points, self.num_chains, num_draws)
        kept_stats = out[:, :num_draws].reshape(*shape, -1).unbind(-1)
        return Round(
            out_z[:, :num_draws].reshape(*shape, self.dim), dict(zip(STATISTICS, kept_stats, strict=True))
        )

    def _acceptance(self, ended: Tensor, kept: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        """Acceptance rates and whether there is one, (P, C) each."""
        table = rate.new_zeros(2, len(self.lane))
        table[0].index_copy_(0, ended, rate)
        table[1].index_copy_(0, ended, kept.to(rate))
        rates, there = table.view(2, len(self.rows), -1)
        return rates, there > 0

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
        return step.log_step[self.rows].exp().repeat_interleave(len(self.lane) // len(self.rows))

    def _noise(self) -> tuple[Tensor, Tensor]:
        """Normals (ticks + 1, L, D) and uniforms (ticks + 1, L, 4), keyed by (seed, point, block)."""
        normals, uniforms = [], []
        table = (self.lane % self.num_chains).reshape(len(self.rows), -1).cpu().numpy()
        for point, chains in zip(self.coordinates.fit.points.tolist(), table, strict=True):
            rng = self.coordinates.task.generator(201, self.stream, point, self.ticks)
            shape = (TICKS_PER_BLOCK + 1, self.num_chains)
            uniforms.append(torch.as_tensor(rng.random((*shape, 4))[:, chains]))
            normals.append(torch.as_tensor(rng.standard_normal((*shape, self.dim))[:, chains]))
        return torch.cat(normals, 1).to(self.z), torch.cat(uniforms, 1).to(self.z)


class Trajectories:
    """One trajectory in every lane.

    Rows hold what moves together, so that a tick is few operations: a *state* is (position, momentum,
    gradient) (3 D), a *draw* is (position, gradient, log density of u, that of z, energy) (2 D + 3).
    """

    def __init__(self, z: Tensor, values: Tensor, grad: Tensor, max_depth: int):
        lanes, dim = z.shape
        self.dim, self.max_depth = dim, max_depth
        self.last = torch.cat([z, grad, values, -values[:, 1:]], 1)  # the chain's current draw
        self.drawn = self.last.clone()  # from the tree so far
        self.sub = self.last.clone()  # from the subtree being built
        self.ends = z.new_zeros(lanes, 2, 3 * dim)  # states at the left and right end
        self.sums = z.new_zeros(lanes, 2, dim)  # momentum summed over the tree and over the subtree
        # (momentum, sum of the subtree's momenta) where balanced subtrees begin
        self.checkpoints = z.new_zeros(lanes, MAX_DEPTH + 1, 2 * dim)
        self.numbers = z.new_zeros(lanes, 5)
        self.counts = torch.zeros(lanes, 3, dtype=torch.long, device=z.device)
        self.forward = torch.zeros(lanes, dtype=torch.long, device=z.device)  # the end that grows
        self.diverging = torch.zeros(lanes, dtype=torch.bool, device=z.device)
        leaf = torch.arange(2**MAX_DEPTH, device=z.device)
        # Of every leaf of a subtree: its checkpoint, and how many balanced subtrees it completes.
        self.checkpoint_of, self.completes = _popcount(leaf >> 1), _popcount(leaf & ~(leaf + 1))
        self.levels = torch.arange(MAX_DEPTH + 1, device=z.device)
        self._name_columns()

    def _name_columns(self) -> None:
        # log weights of tree and subtree, energy at the start, step, acceptance summed over leaves
        self.log_weight, self.sub_weight, self.start_energy, self.step, self.accept = self.numbers.unbind(1)
        # leaves of the subtree, of the trajectory, doublings
        self.leaf, self.leaves, self.depth = self.counts.unbind(1)
        self.end = 2 * torch.arange(len(self.counts), device=self.counts.device)  # row of the left end

    def keep(self, lanes: Tensor) -> None:
        """Go on with these lanes alone."""
        for name in (
            *("last", "drawn", "sub", "ends", "sums", "checkpoints"),
            *("numbers", "counts", "forward", "diverging"),
        ):
            setattr(self, name, getattr(self, name)[lanes])
        self._name_columns()

    def start(self, rows: Tensor, momentum: Tensor, uniform: Tensor, step: Tensor) -> None:
        """Begin new trajectories from the last draws of the lanes ``rows``.

        momentum (L, D), uniform (L,) and step (L,) are of all lanes.
        """
        momentum, last = momentum.index_select(0, rows), self.last.index_select(0, rows)
        energy = 0.5 * momentum.square().sum(-1) - last[:, -2]
        z, grad = last[:, : self.dim], last[:, self.dim : 2 * self.dim]
        state = torch.cat([z, momentum, grad], 1).unsqueeze(1)
        self.ends.index_copy_(0, rows, state.expand(-1, 2, -1))
        self.drawn.index_copy_(0, rows, torch.cat([last[:, :-1], energy.unsqueeze(1)], 1))
        zero = torch.zeros_like(energy)
        self.sums.index_copy_(0, rows, torch.stack([momentum, torch.zeros_like(momentum)], 1))
        numbers = (zero, zero - torch.inf, energy, step.index_select(0, rows), zero)
        self.numbers.index_copy_(0, rows, torch.stack(numbers, 1))
        self.counts.index_fill_(0, rows, 0)
        self.forward.index_copy_(0, rows, (uniform.index_select(0, rows) >= 0.5).long())

    def _start_subtree(self, rows: Tensor, forward: Tensor) -> None:
        self.forward.index_copy_(0, rows, forward.index_select(0, rows))
        self.leaf.index_fill_(0, rows, 0)
        self.sub_weight.index_fill_(0, rows, -torch.inf)
        self.sums[:, 1].index_fill_(0, rows, 0.0)

    def propose(self) -> tuple[Tensor, Tensor]:
        """Half a leapfrog from the end that grows: the new position and the momentum halfway."""
        self.growing = self.end + self.forward
        z, p, g = self.ends.view(-1, 3 * self.dim).index_select(0, self.growing).split(self.dim, 1)
        self.signed = (self.step * (2 * self.forward - 1)).unsqueeze(1)
        half = torch.addcmul(p, self.signed, g, value=0.5)
        return torch.addcmul(z, self.signed, half), half

    def advance(self, z: Tensor, half: Tensor, values: Tensor, grad: Tensor, uniforms: Tensor) -> Tensor:
        """The other half, and the new leaf's place in the tree; returns the rows whose trajectory ended."""
        p = torch.addcmul(half, self.signed, grad, value=0.5)
        energy = 0.5 * p.square().sum(-1) - values[:, 1]
        delta = torch.nan_to_num(
            self.start_energy - energy, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
        )
        self.diverging = delta < -MAX_ENERGY_ERROR
        self.ends.view(-1, 3 * self.dim).index_copy_(0, self.growing, torch.cat([z, p, grad], 1))
        self.accept += delta.clamp(max=0.0).exp_()
        log_uniforms = uniforms.log()

        # The leaf joins its subtree: multinomial sampling within the subtree.
        self.sub_weight.copy_(torch.logaddexp(self.sub_weight, delta))
        taken = _rows(log_uniforms[:, 1] < delta - self.sub_weight)
        draw = torch.cat([z, grad, values, energy.unsqueeze(1)], 1)
        self.sub.index_copy_(0, taken, draw.index_select(0, taken))
        self.sums[:, 1] += p
        broken = self._turning_in_subtree(p) | self.diverging
        self.counts[:, :2] += 1

        # A whole subtree joins the tree: biased progressive sampling, doubling.
        merge = (self.leaf >= 2**self.depth) & ~broken
        accepted = _rows(merge & (log_uniforms[:, 2] < self.sub_weight - self.log_weight))
        self.drawn.index_copy_(0, accepted, self.sub.index_select(0, accepted))
        merged = _rows(merge)
        total = self.sums.index_select(0, merged).sum(1)
        self.sums[:, 0].index_copy_(0, merged, total)
        both = torch.logaddexp(self.log_weight, self.sub_weight)
        self.log_weight.copy_(torch.where(merge, both, self.log_weight))
        self.depth += merge
        p_ends = self.ends.index_select(0, merged)[..., self.dim : 2 * self.dim]
        turning = _is_turning(p_ends[:, 0], p_ends[:, 1], total)
        done = broken.index_copy(0, merged, turning) | (merge & (self.depth >= self.max_depth))
        self._start_subtree(_rows(merge & ~done), (uniforms[:, 3] >= 0.5).long())
        ended = _rows(done)
        self.last.index_copy_(0, ended, self.drawn.index_select(0, ended))
        return ended

    def statistics(self, rows: Tensor) -> Tensor:
        """STATISTICS of the trajectories that ended, (rows, 7)."""
        numbers, counts = self.numbers.index_select(0, rows), self.counts.index_select(0, rows)
        last, diverging = self.last.index_select(0, rows), self.diverging.index_select(0, rows)
        columns = (
            last[:, -3],
            last[:, -1],
            numbers[:, 4] / counts[:, 1],
            numbers[:, 3],
            counts[:, 1],
            counts[:, 2],
            diverging,
        )
        return torch.stack([x.to(last) for x in columns], 1)

    def _turning_in_subtree(self, p: Tensor) -> Tensor:
        """U-turns of the balanced subtrees that the new leaf completes, from O(depth) checkpoints."""
        top = self.checkpoint_of.index_select(0, self.leaf)
        completed = self.completes.index_select(0, self.leaf)
        first = _rows(completed == 0)
        here = torch.cat([p, self.sums[:, 1]], 1).index_select(0, first)
        place = (MAX_DEPTH + 1) * first + top.index_select(0, first)
        self.checkpoints.view(-1, 2 * self.dim).index_copy_(0, place, here)
        odd = _rows(completed > 0)
        if not len(odd):
            return torch.zeros_like(self.diverging)
        top, completed = (x.index_select(0, odd).unsqueeze(1) for x in (top, completed))
        levels = self.levels[: int(top.max()) + 1]
        inside = (levels <= top) & (levels > top - completed)
        kept = self.checkpoints[:, : len(levels)].index_select(0, odd)
        begin, before = kept.split(self.dim, 2)
        total = self.sums[:, 1:].index_select(0, odd) - before + begin
        turning = (inside & _is_turning(begin, p.index_select(0, odd).unsqueeze(1), total)).any(1)
        return torch.zeros_like(self.diverging).index_copy_(0, odd, turning)


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)


def _popcount(x: Tensor) -> Tensor:
    bits = torch.arange(MAX_DEPTH + 1, device=x.device)
    return ((x.unsqueeze(-1) >> bits) & 1).sum(-1)


def _is_turning(p_left: Tensor, p_right: Tensor, p_sum: Tensor) -> Tensor:
    """Generalised U-turn criterion; endpoints count half, which avoids the resonance of i.i.d. normals."""
    inner = p_sum - 0.5 * (p_left + p_right)
    return ((p_left * inner).sum(-1) <= 0.0) | ((p_right * inner).sum(-1) <= 0.0)
