"""NUTS over all lanes at once, as an asynchronous state machine: one leapfrog per tick in every lane.

Multinomial trajectories with biased progressive sampling (Betancourt 2017, A Conceptual Introduction to
Hamiltonian Monte Carlo, appendix A), built iteratively with O(log) checkpoints (Phan, Pradhan and Jankowiak
2019, Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro; Lao and Dillon
2019, Unrolled No-U-Turn Sampler). A lane whose trajectory ends starts the next one in the next tick, so
lanes never wait for one another's tree depth. Every lane of a round draws the same number of times:
stopping all lanes at one tick would keep short trajectories and drop long ones.
"""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayestie._engines._laplace_fit import LaplaceFit, fit_laplace
from bayestie._engines._protocol import Draws, Interrupted, Task
from bayestie._engines._quality import chain_verdict, is_good, quality

MAX_DEPTH = 10
MAX_ENERGY_ERROR = 1000.0
TARGET_ACCEPT = 0.8
TICKS_PER_BLOCK = 32  # noise is drawn, and finished points are dropped, once per block
FIRST_WARMUP, METRIC_WARMUP, STEP_WARMUP = 30, 60, 25
MAX_ROUNDS = 10
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

    def update(self, accept: Tensor, ended: Tensor) -> None:
        """accept and ended are (P, C): a point learns from the chains whose trajectory ended this tick."""
        number = ended.sum(1)
        mean = torch.where(ended, accept, 0.0).sum(1) / number.clamp(min=1)
        self.count = self.count + number
        gain = 1.5 * self.count.clamp(min=1) ** -0.6
        self.log_step = self.log_step + torch.where(number > 0, gain * (mean - TARGET_ACCEPT), 0.0)
        # The average forgets its beginning: weight n on the n-th iterate.
        weight = self.count * (number > 0)
        self.weight = self.weight + weight
        share = weight / self.weight.clamp(min=1e-300)
        self.average = self.average + share * (self.log_step - self.average)

    def finish(self) -> None:
        self.log_step = self.average.clone()


class _Lanes:
    """The state machine for P x C lanes; all tensors lead with the flat lane axis L = P C."""

    def __init__(self, task: Task, fit: LaplaceFit, scale: Tensor, z: Tensor, stream: int):
        self.task, self.stream = task, stream
        self.fit, self.scale = fit, scale  # scale (P, D): diagonal metric in whitened coordinates
        self.num_points, self.num_chains, self.dim = z.shape
        self.z = z.reshape(-1, self.dim).clone()
        self.value, self.grad = self._evaluate(self.z)
        self.ticks = 0
        self.leapfrogs = 0
        self.useful = 0

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient in the sampler's coordinates u = mode + factor (scale * z)."""
        scaled = z.reshape(self.num_points, self.num_chains, self.dim) * self.scale.unsqueeze(1)
        value, grad = self.task.density.value_and_grad(self.fit.points, self.fit.to_position(scaled))
        grad = torch.bmm(grad, self.fit.factor) * self.scale.unsqueeze(1)
        return value.reshape(-1), grad.reshape(-1, self.dim)

    def run(self, num_draws: int, step: _StepSize, adapt: bool, max_depth: int = MAX_DEPTH) -> _Round:
        """``num_draws`` trajectories in every lane."""
        lanes, dim = self.z.shape
        out_z = self.z.new_zeros(lanes, num_draws + 1, dim)  # the last slot takes what is not kept
        out = self.z.new_zeros(lanes, num_draws + 1, len(STATISTICS))
        count = torch.zeros(lanes, dtype=torch.long, device=self.z.device)
        everywhere = torch.ones(lanes, dtype=torch.bool, device=self.z.device)
        shape = (self.num_points, self.num_chains)
        state: _State | None = None
        while True:
            normals, uniforms = self._noise(lanes, dim)
            if state is None:
                state = _State(self.z, self.value, self.grad, max_depth)
                state.start(everywhere, normals[0], uniforms[0], self._steps(step))
            for t in range(1, TICKS_PER_BLOCK + 1):
                z, p = state.propose()
                value, grad = self._evaluate(z)
                ended = state.advance(z, p, value, grad, uniforms[t])
                self.ticks += 1
                self.leapfrogs += lanes
                busy = count < num_draws
                self.useful += int(busy.sum())
                kept = ended & busy
                slot = torch.where(kept, count, num_draws)
                out_z[state.rows, slot] = state.last[:, 0]
                statistics = state.statistics()
                out[state.rows, slot] = statistics
                if adapt:
                    step.update(statistics[:, 2].reshape(shape), kept.reshape(shape))
                count = count + kept.long()
                state.start(ended, normals[t], uniforms[t], self._steps(step))
            self._report(count, num_draws, adapt)
            if bool((count >= num_draws).all()):
                break
        self.z, self.value, self.grad = state.last[:, 0], state.last_value[:, 0], state.last[:, 1]
        kept_stats = out[:, :num_draws].reshape(*shape, num_draws, -1).unbind(-1)
        return _Round(
            out_z[:, :num_draws].reshape(*shape, num_draws, dim),
            dict(zip(STATISTICS, kept_stats, strict=True)),
        )

    def _report(self, count: Tensor, num_draws: int, adapt: bool) -> None:
        self.task.progress(
            {
                "stage": "nuts warmup" if adapt else "nuts",
                "draws_done": int(count.sum()),
                "draws_total": len(count) * num_draws,
            }
        )

    def _steps(self, step: _StepSize) -> Tensor:
        return step.log_step.exp().repeat_interleave(self.num_chains)

    def _noise(self, lanes: int, dim: int) -> tuple[Tensor, Tensor]:
        """Normals (ticks + 1, L, D) and uniforms (ticks + 1, L, 4), keyed by (seed, point, chain, block)."""
        normals, uniforms = [], []
        for point in self.fit.points.tolist():
            for chain in range(self.num_chains):
                rng = self.task.generator(201, self.stream, point, chain, self.ticks)
                normals.append(torch.as_tensor(rng.standard_normal((TICKS_PER_BLOCK + 1, dim))))
                uniforms.append(torch.as_tensor(rng.random((TICKS_PER_BLOCK + 1, 4))))
        return torch.stack(normals, 1).to(self.z), torch.stack(uniforms, 1).to(self.z)


class _State:
    """One trajectory in every lane. Vectors that change together are stacked, so a tick is few operations.

    ends (L, 2, 3, D): position, momentum and gradient at the left and right end of the trajectory.
    Drawn points carry (position, gradient) (L, 2, D) and (log density, energy) (L, 2).
    """

    def __init__(self, z: Tensor, value: Tensor, grad: Tensor, max_depth: int):
        lanes, dim = z.shape
        self.max_depth = max_depth
        self.rows = torch.arange(lanes, device=z.device)
        self.last = torch.stack([z, grad], 1)  # the chain's current draw
        self.last_value = torch.stack([value, value], 1)
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

    def start(self, mask: Tensor, momentum: Tensor, uniforms: Tensor, step: Tensor) -> None:
        """Begin a new trajectory from the last draw in the lanes of ``mask``."""
        energy = 0.5 * momentum.square().sum(-1) - self.last_value[:, 0]
        end = torch.stack([self.last[:, 0], momentum, self.last[:, 1]], 1).unsqueeze(1)
        self.ends = torch.where(mask.view(-1, 1, 1, 1), end, self.ends)
        self.drawn = torch.where(mask.view(-1, 1, 1), self.last, self.drawn)
        value = torch.stack([self.last_value[:, 0], energy], 1)
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

    def advance(self, z: Tensor, half: Tensor, value: Tensor, grad: Tensor, uniforms: Tensor) -> Tensor:
        """The other half, and the new leaf's place in the tree; returns which trajectories ended."""
        p = half + 0.5 * (self.step * self.sign).unsqueeze(-1) * grad
        energy = 0.5 * p.square().sum(-1) - value
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
        self.sub_value = torch.where(take.unsqueeze(1), torch.stack([value, energy], 1), self.sub_value)
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
            self.last_value[:, 1],
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
    def __init__(self, task: Task, points: Tensor, fit: LaplaceFit):
        # The density's own axes suit a diagonal metric better than any others.
        oriented = task.density.axes(fit.points, fit.factor)
        self.task, self.points, self.fit = task, points, replace(fit, factor=oriented)
        dim = fit.mode.shape[1]
        self.begin = time.perf_counter()
        # Overdispersed starts: R-hat sees nothing if all chains begin at one point.
        starts = [task.normals((dim,), 202, int(p), c) for p in points for c in range(task.num_chains)]
        self.z = 1.3 * torch.stack(starts).reshape(len(points), task.num_chains, dim)
        self.scale = torch.ones_like(fit.mode)
        self.step = _StepSize(torch.full((len(points),), 0.8 / dim**0.25).to(fit.mode))
        self.useful = self.executed = 0
        self.stream = 0

    def _lanes(self) -> _Lanes:
        self.stream += 1
        return _Lanes(self.task, self.fit, self.scale, self.z, self.stream)

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
        windows = [METRIC_WARMUP] if bool(self.fit.converged.all()) else [METRIC_WARMUP, 2 * METRIC_WARMUP]
        for window in windows:
            self.step.restart()
            result = self._run(self._lanes(), window, adapt=True, max_depth=7)
            self._learn_scale(result.z[:, :, window // 4 :])
        self.step.restart()
        self._run(self._lanes(), STEP_WARMUP, adapt=True)
        self.step.finish()

    def _learn_scale(self, z: Tensor) -> None:
        count = z.shape[1] * z.shape[2]
        sd = z.flatten(1, 2).std(1)
        # Shrunk towards the Laplace scale as Stan shrinks its variances towards a constant.
        ratio = ((count * sd.square() + 10.0) / (count + 10.0)).sqrt()
        self.scale = self.scale * ratio
        self.z = self.z / ratio.unsqueeze(1)

    def sample(self) -> Draws:
        """Rounds of ``num_draws`` until every quantity of a point is good; good points drop out."""
        count = len(self.points)
        self.kept: list[list[Tensor]] = [[] for _ in range(count)]
        self.kept_stats: list[list[dict[str, Tensor]]] = [[] for _ in range(count)]
        self.quality = [(float("inf"), 0.0, 0.0)] * count
        self.all_points = self.points
        active = torch.arange(count, device=self.points.device)
        try:
            for round_number in range(MAX_ROUNDS):
                bad = self._round(active)
                if not len(bad) or round_number == MAX_ROUNDS - 1:
                    break
                active = active[bad]
                self._keep_only(bad)
        except KeyboardInterrupt as interrupt:
            good = [i for i in range(count) if is_good(self.quality[i], self.task.target_ess)]
            raise Interrupted(self._draws(good)) from interrupt
        return self._draws(list(range(count)))

    def _round(self, active: Tensor) -> Tensor:
        """One round at the active points; the rows of those that need more."""
        task, chains, dim = self.task, self.task.num_chains, self.fit.mode.shape[1]
        result = self._run(self._lanes(), task.num_draws, adapt=False)
        z = result.z.flatten(1, 2) * self.scale.unsqueeze(1)
        position = self.fit.to_position(z).reshape(len(active), chains, task.num_draws, dim)
        still = []
        for row, i in enumerate(active.tolist()):
            self.kept[i].append(position[row])
            self.kept_stats[i].append({name: x[row] for name, x in result.stats.items()})
            self.quality[i] = self._quality(self.points[row : row + 1], torch.cat(self.kept[i], 1))
            if not is_good(self.quality[i], task.target_ess):
                still.append(row)
        count = len(self.all_points)
        task.progress(
            {
                "stage": "nuts",
                "strengths_done": task.num_points - len(still),
                "strengths_total": task.num_points,
                "min_ess": min(min(q[1], q[2]) for q in self.quality),
                "message": f"{count - len(still)} of {count} strengths mixed",
            }
        )
        return torch.tensor(still, dtype=torch.long, device=self.points.device)

    def _keep_only(self, rows: Tensor) -> None:
        self.points, self.fit = self.points[rows], self.fit.take(rows)
        self.scale, self.z = self.scale[rows], self.z[rows]
        self.step.log_step = self.step.log_step[rows]
        self.step.restart()

    def _quality(self, point: Tensor, draws: Tensor) -> tuple[float, float, float]:
        """(max R-hat, min bulk ESS, min tail ESS) over latents and all posterior variables of a point."""
        if self.task.quantities is not None:
            draws = torch.cat([draws, self.task.quantities(point, draws.unsqueeze(0))[0]], -1)
        return quality(draws)

    def _draws(self, rows: list[int]) -> Draws:
        task = self.task
        positions, stats, certified, reasons, total_divergences = [], [], [], [], []
        for i in rows:
            draws = torch.cat(self.kept[i], 1)
            thin = draws.shape[1] // task.num_draws
            positions.append(draws[:, ::thin][:, : task.num_draws])
            joined = {name: torch.cat([s[name] for s in self.kept_stats[i]], 1) for name in STATISTICS}
            divergences = int(joined["diverging"].sum())
            stats.append({name: x[:, ::thin][:, : task.num_draws] for name, x in joined.items()})
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
