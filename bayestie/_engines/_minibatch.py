"""Minibatches of a model whose plates have ``subsample_size``: rows of every step, scores on them."""

import torch
from torch import Tensor

from bayestie._density import ProgramDensity
from bayestie._engines._protocol import Task
from bayestie._errors import ModelError
from bayestie._program import LaneProgram

STREAM = 311


def check_minibatches(task: Task) -> None:
    """Run the model on one minibatch, if it asks for any.

    Raises:
        ModelError: (and its kinds) a latent in a plate with ``subsample_size``, or a model that does not
            run on some of its rows.
    """
    program = task.program
    if not program.minibatches:
        return
    for name, plates in program.latent_plates.items():
        for plate in plates:
            if plate in program.minibatches:
                size, whole = program.minibatches[plate]
                raise ModelError(
                    f"latent site '{name}' in plate '{plate}'",
                    found=f"a value for every row, and minibatches of {size} of {whole} rows",
                    expected="latents outside of plates with subsample_size",
                    fix="Drop subsample_size, move the site out of the plate and index it there "
                    "(theta[group[rows]]), or use another engine than svi, which sees all rows.",
                )
    program.check_rows(draw_rows(task, 0))


def draw_rows(task: Task, step: int) -> dict[str, Tensor]:
    """Rows of every plate with ``subsample_size``, without replacement: the same for all points."""
    rows = {}
    for number, (name, (size, whole)) in enumerate(task.program.minibatches.items()):
        chosen = task.generator(STREAM, step, number).choice(whole, size, replace=False, shuffle=False)
        rows[name] = torch.as_tensor(chosen, device=task.program.device)
    return rows


def describe_minibatches(program: LaneProgram) -> str:
    """In words, for the verdict of a fit; empty where there are none."""
    return "".join(
        f", steps on minibatches of {size} of {whole} rows of plate '{name}'"
        for name, (size, whole) in program.minibatches.items()
    )


class MinibatchScore:
    """Gradients of log p on a fresh minibatch at every call, unbiased for the gradient on all rows.

    The noise of a minibatch is mostly that of its sum of scores, whichever draw of the guide they are taken
    at. So they are also taken at an anchor where the gradient on all rows is known, and the difference
    there is the control variate (Johnson and Zhang 2013, Accelerating stochastic gradient descent using
    predictive variance reduction). Its coefficient per latent is learned from the calls before, as far
    from the anchor it would add noise.

    Args:
        task: the work.
        points: points served, (P,).
        anchor: positions near which gradients will be asked for, (P, num_latent).
        first_step: number of the first call, which keys the rows.
    """

    def __init__(self, task: Task, points: Tensor, anchor: Tensor, first_step: int):
        self.task, self.points, self.anchor, self.step = task, points, anchor.unsqueeze(1), first_step
        self.density = (
            task.density if isinstance(task.density, ProgramDensity) else ProgramDensity(task.program)
        )
        self.whole = task.density.value_and_grad(points, self.anchor)[1]
        self.moments: Tensor | None = None

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """log density (P, batch), without control variate, and score (P, batch, num_latent)."""
        rows = draw_rows(self.task, self.step)
        self.step += 1
        both = torch.cat([position, self.anchor], 1)
        value, score = self.density.value_and_grad(self.points, both, rows)
        score, there = score[:, :-1], score[:, -1:]
        off = torch.nan_to_num(there - self.whole, nan=0.0, posinf=0.0, neginf=0.0)
        return value[:, :-1], score - self._coefficient(score, off) * off

    def _coefficient(self, score: Tensor, off: Tensor) -> Tensor:
        """Per latent (P, 1, D), from the calls before this one, so that the estimate stays unbiased."""
        mean = torch.nan_to_num(score.mean(1, keepdim=True), nan=0.0, posinf=0.0, neginf=0.0)
        moments = torch.stack([mean * off, off.square()])
        before = self.moments
        self.moments = moments if before is None else 0.9 * before + 0.1 * moments
        if before is None:
            return torch.ones_like(off)
        return torch.where(before[1] > 0.0, before[0] / before[1], 1.0).clamp(0.0, 1.0)
