"""NUTS over all lanes at once, as an asynchronous state machine: one leapfrog per tick in every lane.

Multinomial trajectories with biased progressive sampling (Betancourt 2017, A Conceptual Introduction to
Hamiltonian Monte Carlo, appendix A), built iteratively with O(log) checkpoints (Phan, Pradhan and Jankowiak
2019, Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro; Lao and Dillon
2019, Unrolled No-U-Turn Sampler). A lane whose trajectory ends starts the next one in the next tick, so
lanes never wait for one another's tree depth. Every lane of a round draws the same number of times:
stopping all lanes at one tick would keep short trajectories and drop long ones.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayestie._engines._axis_map import AxisMap, axis_map
from bayestie._engines._laplace_fit import LaplaceFit, fit_laplace
from bayestie._engines._protocol import Draws, Interrupted, Task
from bayestie._engines._quality import chain_verdict, is_good, qualities

MAX_DEPTH = 10
MAX_ENERGY_ERROR = 1000.0
TARGET_ACCEPT = 0.8
TICKS_PER_BLOCK = 32  # noise is drawn, and finished lanes are dropped, once per block
FIRST_WARMUP, STEP_WARMUP = 12, 12  # trajectories of every chain
METRIC_DRAWS = 240  # pooled over a point's chains, for its metric; every chain gives at least 16
SHORTEST = 50  # draws of a short chain in a round, at least
FIRST_ROUND = 1.4  # times what is stored: R-hat of many quantities at once needs some 1,400 draws
LANES = {"cpu": 256, "cuda": 8192}  # lanes that pay for the fixed cost of a tick
MAX_TOTAL = 16  # times the first round, at most
_JUDGED = 5_000_000  # numbers judged together
STATISTICS = ("lp", "energy", "acceptance_rate", "step_size", "n_steps", "tree_depth", "diverging")


@dataclass
class _Round:
    """Draws of one round: whitened positions (P, C, N, D), the rest (P, C, N)."""

    z: Tensor
    stats: dict[str, Tensor]


class _StepSize:
    """Step size by stochastic approximation of its logarithm, pooled over the chains of a point.

    Robbins-Monro with gain n^-0.6 and averaging of the later iterates (Polyak and Juditsky 1992). Pooled
    chains update several times in the span of one trajectory; dual averaging with its usual constants
    then swings over two orders of magnitude, and every swing down is a deep tree in all lanes.
    """

    def __init__(self, initial: Tensor):
        self.log_step = initial.log()
        self.restart()

    def restart(self) -> None:
        self.count = torch.zeros_like(self.log_step)
        self.weight = torch.zeros_like(self.log_step)
        self.average = self.log_step.clone()

    def update(self, index: Tensor, accept: Tensor, ended: Tensor) -> None:
        """accept and ended are (P, C), ``index`` (P,) says of which points: a point learns from the chains
        whose trajectory ended this tick."""
        number = ended.sum(1)
        mean = torch.where(ended, accept, 0.0).sum(1) / number.clamp(min=1)
        count = self.count[index] + number
        gain = 1.5 * count.clamp(min=1) ** -0.6
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
class _Coordinates:
    """The sampler's coordinates z of every point: u = mode + factor T(scale z), without a map T(x) = x."""

    task: Task
    fit: LaplaceFit
    scale: Tensor  # (P, D)
    map: AxisMap | None

    def take(self, index: Tensor) -> "_Coordinates":
        kept = None if self.map is None else self.map.take(index)
        return _Coordinates(self.task, self.fit.take(index), self.scale[index], kept)

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


class _Lanes:
    """The state machine for P x C lanes; flat lane axis L = P C. Lanes that are done leave the batch."""

    def __init__(self, coordinates: _Coordinates, z: Tensor, stream: int):
        self.coordinates, self.stream = coordinates, stream
        self.num_points, self.num_chains, self.dim = z.shape
        self.z = z.reshape(-1, self.dim).clone()
        # What is still in the batch: rows of the points, and of every lane its number among all.
        self.rows = torch.arange(self.num_points, device=z.device)
        self.lane = torch.arange(len(self.z), device=z.device)
        self.ticks = 0
        self.leapfrogs = 0
        self.useful = 0

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities of u and z, (L, 2), and the gradient of the latter, (L, D)."""
        value, own, grad = self.coordinates.evaluate(z.reshape(len(self.rows), -1, self.dim))
        return torch.stack([value.reshape(-1), own.reshape(-1)], 1), grad.reshape(-1, self.dim)

    def run(self, num_draws: int, step: _StepSize, adapt: bool, max_depth: int = MAX_DEPTH) -> _Round:
        """``num_draws`` trajectories in every lane."""
        total = len(self.z)
        out_z = self.z.new_zeros(total, num_draws + 1, self.dim)  # the last slot takes what is not kept
        out = self.z.new_zeros(total, num_draws + 1, len(STATISTICS))
        count = torch.zeros(total, dtype=torch.long, device=self.z.device)
        state = _State(self.z, *self._evaluate(self.z), max_depth)
        normals, uniforms = self._noise()
        state.start(torch.ones_like(count, dtype=torch.bool), normals[0], uniforms[0], self._steps(step))
        while True:
            for t in range(1, TICKS_PER_BLOCK + 1):
                z, p = state.propose()
                ended = state.advance(z, p, *self._evaluate(z), uniforms[t])
                self.ticks += 1
                self.leapfrogs += len(z)
                busy = count < num_draws
                self.useful += int(busy.sum())
                kept = ended & busy
                slot = torch.where(kept, count, num_draws)
                out_z[self.lane, slot] = state.last[:, 0]
                statistics = state.statistics()
                out[self.lane, slot] = statistics
                if adapt:
                    shape = (len(self.rows), -1)
                    step.update(self.rows, statistics[:, 2].reshape(shape), kept.reshape(shape))
                count = count + kept.long()
                state.start(ended, normals[t], uniforms[t], self._steps(step))
            busy = count < num_draws
            self._report(total * num_draws - int((num_draws - count[busy]).sum()), total * num_draws, adapt)
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
        return _Round(
            out_z[:, :num_draws].reshape(*shape, self.dim), dict(zip(STATISTICS, kept_stats, strict=True))
        )

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

    def _report(self, done: int, total: int, adapt: bool) -> None:
        stage = "nuts warmup" if adapt else "nuts"
        self.coordinates.task.progress({"stage": stage, "draws_done": done, "draws_total": total})

    def _steps(self, step: _StepSize) -> Tensor:
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


class _State:
    """One trajectory in every lane. Vectors that change together are stacked, so a tick is few operations.

    ends (L, 2, 3, D): position, momentum and gradient at the left and right end of the trajectory.
    Drawn points carry (position, gradient) (L, 2, D) and (log density of u, of z, energy) (L, 3).
    """

    def __init__(self, z: Tensor, values: Tensor, grad: Tensor, max_depth: int):
        lanes, dim = z.shape
        self.max_depth = max_depth
        self.rows = torch.arange(lanes, device=z.device)
        self.last = torch.stack([z, grad], 1)  # the chain's current draw
        self.last_value = torch.cat([values, -values[:, 1:]], 1)
        self.drawn, self.drawn_value = self.last.clone(), self.last_value.clone()  # from the tree so far
        self.sub, self.sub_value = self.last.clone(), self.last_value.clone()  # from the subtree being built
        self.ends = z.new_zeros(lanes, 2, 3, dim)
        self.sums = z.new_zeros(lanes, 2, dim)  # momentum summed over the tree and over the subtree
        self.checkpoints = z.new_zeros(lanes, MAX_DEPTH + 1, 2, dim)
        # log weights of tree and subtree, energy at the start, step, direction
        self.log_weight, self.sub_weight = z.new_zeros(lanes), z.new_zeros(lanes)
        self.start_energy, self.step, self.sign = z.new_zeros(lanes), z.new_ones(lanes), z.new_ones(lanes)
        self.depth, self.leaf, self.leaves = (
            torch.zeros(lanes, dtype=torch.long, device=z.device) for _ in range(3)
        )
        self.accept = z.new_zeros(lanes)
        self.diverging = torch.zeros(lanes, dtype=torch.bool, device=z.device)
        self.levels = torch.arange(MAX_DEPTH + 1, device=z.device)

    def keep(self, lanes: Tensor) -> None:
        """Go on with these lanes alone."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in ("rows", "levels"):
                setattr(self, name, value[lanes])
        self.rows = torch.arange(len(lanes), device=lanes.device)

    def start(self, mask: Tensor, momentum: Tensor, uniforms: Tensor, step: Tensor) -> None:
        """Begin a new trajectory from the last draw in the lanes of ``mask``."""
        energy = 0.5 * momentum.square().sum(-1) - self.last_value[:, 1]
        end = torch.stack([self.last[:, 0], momentum, self.last[:, 1]], 1).unsqueeze(1)
        self.ends = torch.where(mask.view(-1, 1, 1, 1), end, self.ends)
        self.drawn = torch.where(mask.view(-1, 1, 1), self.last, self.drawn)
        value = torch.cat([self.last_value[:, :2], energy.unsqueeze(1)], 1)
        self.drawn_value = torch.where(mask.unsqueeze(1), value, self.drawn_value)
        self.sums = torch.where(mask.view(-1, 1, 1), momentum.unsqueeze(1), self.sums)
        self.start_energy = torch.where(mask, energy, self.start_energy)
        self.step = torch.where(mask, step, self.step)
        going = ~mask
        self.log_weight, self.accept = self.log_weight * going, self.accept * going
        self.depth, self.leaves = self.depth * going, self.leaves * going
        self._start_subtree(mask, uniforms)

    def _start_subtree(self, mask: Tensor, uniforms: Tensor) -> None:
        self.sign = torch.where(mask, torch.where(uniforms[:, 0] < 0.5, -1.0, 1.0), self.sign)
        self.leaf = self.leaf * ~mask
        self.sub_weight = torch.where(mask, -torch.inf, self.sub_weight)
        self.sums[:, 1] *= (~mask).unsqueeze(1)

    def propose(self) -> tuple[Tensor, Tensor]:
        """Half a leapfrog from the end that grows: the new position and the momentum halfway."""
        z, p, g = self.ends[self.rows, (self.sign > 0).long()].unbind(1)
        signed = (self.step * self.sign).unsqueeze(-1)
        half = p + 0.5 * signed * g
        return z + signed * half, half

    def advance(self, z: Tensor, half: Tensor, values: Tensor, grad: Tensor, uniforms: Tensor) -> Tensor:
        """The other half, and the new leaf's place in the tree; returns which trajectories ended."""
        p = half + 0.5 * (self.step * self.sign).unsqueeze(-1) * grad
        energy = 0.5 * p.square().sum(-1) - values[:, 1]
        delta = self.start_energy - energy
        delta = torch.where(torch.isnan(delta), -torch.inf, delta)
        self.diverging = delta < -MAX_ENERGY_ERROR
        self.ends[self.rows, (self.sign > 0).long()] = torch.stack([z, p, grad], 1)
        self.leaves = self.leaves + 1
        self.accept = self.accept + delta.clamp(max=0.0).exp()

        # The leaf joins its subtree: multinomial sampling within the subtree.
        self.sub_weight = torch.logaddexp(self.sub_weight, delta)
        take = uniforms[:, 1].log() < delta - self.sub_weight
        self.sub = torch.where(take.view(-1, 1, 1), torch.stack([z, grad], 1), self.sub)
        self.sub_value = torch.where(
            take.unsqueeze(1), torch.cat([values, energy.unsqueeze(1)], 1), self.sub_value
        )
        self.sums[:, 1] += p
        broken = self._turning_in_subtree(p) | self.diverging

        # A whole subtree joins the tree: biased progressive sampling, doubling.
        merge = (self.leaf + 1 >= 2**self.depth) & ~broken
        accept = merge & (uniforms[:, 2].log() < self.sub_weight - self.log_weight)
        self.drawn = torch.where(accept.view(-1, 1, 1), self.sub, self.drawn)
        self.drawn_value = torch.where(accept.unsqueeze(1), self.sub_value, self.drawn_value)
        self.sums[:, 0] += torch.where(merge.unsqueeze(1), self.sums[:, 1], 0.0)
        self.log_weight = torch.where(
            merge, torch.logaddexp(self.log_weight, self.sub_weight), self.log_weight
        )
        self.depth = self.depth + merge.long()
        turning = _is_turning(self.ends[:, 0, 1], self.ends[:, 1, 1], self.sums[:, 0])
        ended = broken | (merge & (turning | (self.depth >= self.max_depth)))
        self.leaf = self.leaf + 1
        self._start_subtree(merge & ~ended, uniforms[:, 3:])
        self.last = torch.where(ended.view(-1, 1, 1), self.drawn, self.last)
        self.last_value = torch.where(ended.unsqueeze(1), self.drawn_value, self.last_value)
        return ended

    def statistics(self) -> Tensor:
        """STATISTICS of the trajectory as it stands, (L, 7)."""
        columns = (
            self.last_value[:, 0],
            self.last_value[:, 2],
            self.accept / self.leaves,
            self.step,
            self.leaves,
            self.depth,
            self.diverging,
        )
        return torch.stack([x.to(self.step) for x in columns], 1)

    def _turning_in_subtree(self, p: Tensor) -> Tensor:
        """U-turns of the balanced subtrees that the new leaf completes, from O(depth) checkpoints."""
        top = _popcount(self.leaf >> 1)
        even = (self.leaf & 1) == 0
        # Even leaves leave a checkpoint, odd ones overwrite theirs with itself.
        here = torch.stack([p, self.sums[:, 1]], 1)
        kept = self.checkpoints[self.rows, top]
        self.checkpoints[self.rows, top] = torch.where(even.view(-1, 1, 1), here, kept)
        trailing = _popcount(self.leaf & ~(self.leaf + 1))  # one bits at the end: subtrees the leaf completes
        depth = int(top.max()) + 1
        levels = self.levels[:depth]
        inside = (levels <= top.unsqueeze(1)) & (levels > (top - trailing).unsqueeze(1)) & ~even.unsqueeze(1)
        first, before = self.checkpoints[:, :depth, 0], self.checkpoints[:, :depth, 1]
        total = self.sums[:, 1:] - before + first
        return (inside & _is_turning(first, p.unsqueeze(1), total)).any(1)


def _popcount(x: Tensor) -> Tensor:
    bits = torch.arange(MAX_DEPTH + 1, device=x.device)
    return ((x.unsqueeze(-1) >> bits) & 1).sum(-1)


def _is_turning(p_left: Tensor, p_right: Tensor, p_sum: Tensor) -> Tensor:
    """Generalised U-turn criterion; endpoints count half, which avoids the resonance of i.i.d. normals."""
    inner = p_sum - 0.5 * (p_left + p_right)
    return ((p_left * inner).sum(-1) <= 0.0) | ((p_right * inner).sum(-1) <= 0.0)


def run_nuts(task: Task, points: Tensor | None = None, fit: LaplaceFit | None = None) -> Draws:
    """Draws at ``points`` (all by default): warmup, then rounds until R-hat and ESS are met."""
    points = task.points if points is None else points
    fit = fit_laplace(task, points) if fit is None else fit
    sampler = _Sampler(task, points, fit)
    sampler.warm_up()
    return sampler.sample()


class _Sampler:
    """Warmup and rounds at all points.

    Every stored chain is made of short chains that begin at one overdispersed point, so that many lanes share
    the fixed cost of a tick: Margossian et al. (2024), Nested R-hat, Bayesian Analysis. Joined end to end,
    their R-hat compares groups of different starts, and their autocorrelations carry the taper (1 - t / n) of
    independent pieces of length n.
    """

    def __init__(self, task: Task, points: Tensor, fit: LaplaceFit):
        # The density's own axes suit a diagonal metric, and maps along them, better than any others.
        dim = fit.mode.shape[1]
        oriented = replace(fit, factor=task.density.axes(fit.points, fit.factor))
        self.task, self.points = task, points
        self.at = _Coordinates(task, oriented, torch.ones_like(fit.mode), axis_map(task, oriented))
        self.begin = time.perf_counter()
        self.pieces = self._num_pieces(len(points))
        self.num_chains = task.num_chains * self.pieces
        # Overdispersed starts: R-hat sees nothing if all chains begin at one point.
        starts = [task.normals((dim,), 202, int(p), c) for p in points for c in range(task.num_chains)]
        self.z = 1.3 * torch.stack(starts).repeat_interleave(self.pieces, 0)
        self.z = self.z.reshape(len(points), self.num_chains, dim)
        self.step = _StepSize(torch.full((len(points),), 0.8 / dim**0.25).to(fit.mode))
        self.useful = self.executed = 0
        self.stream = 0

    def _num_pieces(self, num_points: int) -> int:
        """Short chains per stored chain."""
        lanes = LANES.get(self.task.program.device.type, LANES["cpu"])
        wanted = lanes // (num_points * self.task.num_chains)
        return max(1, min(wanted, self.task.num_draws // SHORTEST))

    def _lanes(self) -> _Lanes:
        self.stream += 1
        return _Lanes(self.at, self.z, self.stream)

    def _run(self, lanes: _Lanes, num_draws: int, adapt: bool, max_depth: int = MAX_DEPTH) -> _Round:
        result = lanes.run(num_draws, self.step, adapt, max_depth)
        self.useful += lanes.useful
        self.executed += lanes.leapfrogs
        self.z = lanes.z.reshape(self.z.shape)
        return result

    def warm_up(self) -> None:
        """Step size on the Laplace metric, then a diagonal correction of it pooled over chains."""
        # The first steps may be far too small; shallow trees keep them cheap.
        self._run(self._lanes(), FIRST_WARMUP, adapt=True, max_depth=5)
        window = max(16, METRIC_DRAWS // self.num_chains)
        for factor in (1,) if bool(self.at.fit.converged.all()) else (1, 2):
            self.step.restart()
            result = self._run(self._lanes(), factor * window, adapt=True, max_depth=7)
            self._learn_scale(result.z[:, :, factor * window // 4 :])
        self.step.restart()
        self._run(self._lanes(), STEP_WARMUP, adapt=True)
        self.step.finish()

    def _learn_scale(self, z: Tensor) -> None:
        count = z.shape[1] * z.shape[2]
        sd = z.flatten(1, 2).std(1)
        # Shrunk towards the Laplace scale as Stan shrinks its variances towards a constant.
        ratio = ((count * sd.square() + 10.0) / (count + 10.0)).sqrt()
        self.at.scale = self.at.scale * ratio
        self.z = self.z / ratio.unsqueeze(1)

    def sample(self) -> Draws:
        """Rounds until every quantity of a point is good; points that are good drop out.

        The first round makes what is stored and some more, a later one a quarter of what there is by then. If
        a point is still not good, its oldest draws may be from before it settled: the newer half is judged
        alone.
        """
        count = len(self.points)
        self.kept: list[list[tuple[Tensor, dict[str, Tensor]]]] = [[] for _ in range(count)]
        self.quality = [(float("inf"), 0.0, 0.0)] * count
        self.all_points = self.points
        active = torch.arange(count, device=self.points.device)
        first = math.ceil(FIRST_ROUND * self.task.num_draws / self.pieces)
        made, size = 0, first
        try:
            while True:
                bad = self._round(active, size)
                made += size
                size = max(1, made // 4)
                if not len(bad) or made >= MAX_TOTAL * first:
                    break
                active = active[bad]
                self._keep_only(bad)
        except KeyboardInterrupt as interrupt:
            good = [i for i in range(count) if is_good(self.quality[i], self.task.target_ess)]
            raise Interrupted(self._draws(good)) from interrupt
        return self._draws(list(range(count)))

    def _round(self, active: Tensor, num_draws: int) -> Tensor:
        """One round at the active points; the rows of those that need more."""
        result = self._run(self._lanes(), num_draws, adapt=False)
        position = self.at.to_position(result.z.flatten(1, 2)).reshape(result.z.shape)
        for row, i in enumerate(active.tolist()):
            self.kept[i].append((position[row], {name: x[row] for name, x in result.stats.items()}))
        self._judge(active)
        good = [is_good(self.quality[i], self.task.target_ess) for i in active.tolist()]
        still = [row for row, ok in enumerate(good) if not ok]
        count = len(self.all_points)
        self.task.progress(
            {
                "stage": "nuts",
                "strengths_done": self.task.num_points - len(still),
                "strengths_total": self.task.num_points,
                "min_ess": min(min(q[1], q[2]) for q in self.quality),
                "message": f"{count - len(still)} of {count} strengths mixed",
            }
        )
        return torch.tensor(still, dtype=torch.long, device=self.points.device)

    def _judge(self, active: Tensor) -> None:
        """Quality of all draws of the active points, or of the newer half where that alone is good."""
        points = active.tolist()
        self._judge_from(points, self.points, 0)
        sizes = [z.shape[1] for z, _ in self.kept[points[0]]]
        newest = max(i for i in range(len(sizes)) if 2 * sum(sizes[i:]) >= sum(sizes))
        bad = [row for row, i in enumerate(points) if not is_good(self.quality[i], self.task.target_ess)]
        if newest and bad and self.pieces * sum(sizes[newest:]) >= self.task.num_draws:
            rows = torch.tensor(bad, device=self.points.device)
            self._judge_from([points[row] for row in bad], self.points[rows], newest)

    def _judge_from(self, numbers: list[int], points: Tensor, oldest: int) -> None:
        """Judge the rounds from ``oldest`` on; if older ones are left out, keep the verdict only if good."""
        draws = torch.stack([self._joined([z for z, _ in self.kept[i][oldest:]]) for i in numbers])
        per_point = max(1, draws[0].numel())
        for part in range(0, len(numbers), max(1, _JUDGED // per_point)):
            some = slice(part, part + max(1, _JUDGED // per_point))
            # Of latents in their own scale: ranks do not see which, where the map is monotone.
            values = draws[some]
            if self.task.quantities is not None:
                values = self.task.quantities(points[some], values)
            for i, found in zip(numbers[some], qualities(values), strict=True):
                if oldest == 0:
                    self.quality[i] = found
                elif is_good(found, self.task.target_ess):
                    self.quality[i], self.kept[i] = found, self.kept[i][oldest:]

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Rounds of short chains (C pieces, n, ...) -> stored chains (C, pieces n, ...), end to end."""
        whole = torch.cat(parts, 1)
        return whole.reshape(self.task.num_chains, -1, *whole.shape[2:])

    def _keep_only(self, rows: Tensor) -> None:
        self.points, self.at, self.z = self.points[rows], self.at.take(rows), self.z[rows]
        self.step = _StepSize(self.step.log_step[rows].exp())

    def _draws(self, rows: list[int]) -> Draws:
        task = self.task
        positions, stats, certified, reasons, total_divergences = [], [], [], [], []
        for i in rows:
            draws = self._joined([z for z, _ in self.kept[i]])
            thinned = torch.arange(task.num_draws, device=draws.device) * draws.shape[1] // task.num_draws
            positions.append(draws[:, thinned])
            joined = {name: self._joined([s[name] for _, s in self.kept[i]]) for name in STATISTICS}
            divergences = int(joined["diverging"].sum())
            stats.append({name: x[:, thinned] for name, x in joined.items()})
            total = joined["diverging"].numel()
            ok, reason = chain_verdict(self.quality[i], divergences, total, task.target_ess)
            certified.append(ok)
            reasons.append(reason)
            total_divergences.append(divergences)
        count = len(rows)
        seconds = (time.perf_counter() - self.begin) / max(1, len(self.all_points))
        nan = torch.full((count,), torch.nan, dtype=torch.float64)
        merged = {
            name: torch.stack([s[name] for s in stats])
            if stats
            else self.z.new_empty(0, task.num_chains, task.num_draws)
            for name in STATISTICS
        }
        lp = merged.pop("lp")
        merged["diverging"] = merged["diverging"] > 0
        return Draws(
            points=self.all_points[torch.tensor(rows, dtype=torch.long, device=self.all_points.device)],
            position=torch.stack(positions)
            if positions
            else self.z.new_empty(0, *lp.shape[1:], self.z.shape[2]),
            log_density=lp,
            engine=["nuts"] * count,
            certified=certified,
            reason=reasons,
            exact=[False] * count,
            khat=torch.full((count,), torch.inf).to(lp),
            ess_weights=torch.full((count,), torch.inf).to(lp),
            log_evidence=nan.to(lp),
            log_evidence_error=nan.to(lp),
            seconds=torch.full((count,), seconds, dtype=torch.float64),
            quality=torch.tensor([self.quality[i] for i in rows], dtype=torch.float64).reshape(count, 3),
            divergences=torch.tensor(total_divergences, dtype=torch.long),
            stats=merged,
        )
