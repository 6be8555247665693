"""One NUTS trajectory in every lane, as a state machine that takes one leapfrog at a time.

Multinomial trajectories with biased progressive sampling (Betancourt 2017, A Conceptual Introduction to
Hamiltonian Monte Carlo, appendix A), built iteratively with O(log) checkpoints (Phan, Pradhan and Jankowiak
2019, Composable Effects for Flexible and Accelerated Probabilistic Programming in NumPyro; Lao and Dillon
2019, Unrolled No-U-Turn Sampler).
"""

import torch
from torch import Tensor

MAX_DEPTH = 10
MAX_ENERGY_ERROR = 1000.0
STATISTICS = ("lp", "energy", "acceptance_rate", "step_size", "n_steps", "tree_depth", "diverging")


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

        momentum (rows, D) is of these; uniform (L,) and step (L,) are of all lanes.
        """
        last = self.last.index_select(0, rows)
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

    def record(
        self, rows: Tensor, lane: Tensor, count: Tensor, z: Tensor, statistics: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store the draws of the trajectories that ended, in the next slots of their lanes.

        Args:
            rows: lanes of the batch whose trajectory ended.
            lane: of every lane of the batch, its number in the round.
            count: draws stored so far, of every lane of the batch; raised.
            z: positions (lanes of the round, num_draws + 1, D); the last slot takes what is not wanted.
            statistics: `STATISTICS` in the same slots.

        Returns:
            Of ``rows``: whether the draw was wanted, and the trajectory's acceptance rate.
        """
        num_draws = z.shape[1] - 1
        numbers, counts = self.numbers.index_select(0, rows), self.counts.index_select(0, rows)
        last, diverging = self.last.index_select(0, rows), self.diverging.index_select(0, rows)
        rate = numbers[:, 4] / counts[:, 1]
        columns = (last[:, -3], last[:, -1], rate, numbers[:, 3], counts[:, 1], counts[:, 2], diverging)
        so_far = count.index_select(0, rows)
        kept = so_far < num_draws
        slot = (num_draws + 1) * lane.index_select(0, rows) + torch.where(kept, so_far, num_draws)
        z.view(-1, self.dim).index_copy_(0, slot, last[:, : self.dim])
        row = torch.stack([x.to(last) for x in columns], 1)
        statistics.view(-1, len(STATISTICS)).index_copy_(0, slot, row)
        count.index_add_(0, rows, kept.long())
        return kept, rate

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
