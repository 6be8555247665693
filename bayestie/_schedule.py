"""Strength schedules: every fit reached through other strengths, the copies carried from one to the next.

A firm tie makes the optimum that a search ends in depend on where it begins: a copy whose own data are clear
is held back by copies that are still lost. A schedule that begins loose lets each copy settle by its own data
first (Bengio, Louradour, Collobert and Weston 2009, Curriculum learning; Allgower and Georg 1990, Numerical
continuation methods).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import biject_to

from bayestie._engines import LaplaceFit, Task, fit_laplace, settle_guide
from bayestie._errors import OptionError
from bayestie._program import LaneProgram


def checked_schedule(
    schedule: Mapping[str, Sequence[float]], swept: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The schedule as arrays of one length, each going one way.

    Raises:
        OptionError: anything else, or a keyword that the call gives no strength to.
    """
    if not isinstance(schedule, Mapping) or not schedule:
        raise OptionError(
            "schedule",
            found=repr(schedule)[:80],
            expected="a dict from keywords of the model to the strengths to pass through, in order",
            fix='Write schedule={"sigma": bayestie.strengths(0.1, 30, 12)[::-1]} to begin loose.',
        )
    values = {}
    for name, given in schedule.items():
        try:
            array = np.asarray(given, dtype=float)
        except (TypeError, ValueError):
            array = np.empty((0, 0))
        steps = np.diff(array) if array.ndim == 1 else array
        if array.ndim != 1 or not array.size or not (bool((steps > 0).all()) or bool((steps < 0).all())):
            raise OptionError(
                f"schedule['{name}']",
                found=repr(given)[:80],
                expected="a list of numbers that only falls, or only rises",
                fix="Begin with the strength furthest from those you want.",
            )
        if name not in swept and not isinstance(kwargs.get(name), int | float):
            raise OptionError(
                f"schedule['{name}']",
                found=f"no number for '{name}' in the call"
                if name not in kwargs
                else repr(kwargs[name])[:80],
                expected="a keyword that is swept, or given as one number: where the schedule ends",
                fix=f"Pass {name}=..., or sweep it.",
            )
        values[name] = array
    lengths = {name: len(array) for name, array in values.items()}
    if len(set(lengths.values())) > 1:
        raise OptionError(
            "schedule",
            found=", ".join(f"{length} values of '{name}'" for name, length in lengths.items()),
            expected="as many values of each keyword: they are passed through together",
            fix="Repeat none: give every keyword a value at every stage.",
        )
    return values


def follow(
    task: Task,
    schedule: Mapping[str, np.ndarray],
    make_task: Callable[[LaneProgram], Task],
    *,
    variational: bool,
) -> LaplaceFit:
    """The Laplace fit of every point, its mode looked for from where the schedule led.

    At a stage every point has the schedule's strengths, but for those it has already reached: a falling
    schedule is left where it would go below the point's own strength. Each stage begins with the copies,
    levels and other latents where the one before ended, at modes, or, if ``variational``, at the means of
    Gaussian guides that maximise the stage's ELBO.

    Args:
        task: the work at the points' own strengths.
        schedule: from `checked_schedule`.
        make_task: the work of a stage, given its program.
        variational: follow guides rather than modes.
    """
    stages = list(_stages(task.program, schedule))
    before, position = task.program, None
    for number, program in enumerate(_programs(task.program, stages)):
        stage = make_task(program)
        start = None if position is None else carried(before, program, position)
        fit = fit_laplace(stage, stage.points, start, only=position is not None)
        position = settle_guide(stage, fit) if variational else fit.mode
        before = program
        task.progress({"stage": "schedule", "message": f"{number + 1} of {len(stages)} strengths passed"})
    start = None if position is None else carried(before, task.program, position)
    return fit_laplace(task, task.points, start)


def _stages(program: LaneProgram, schedule: Mapping[str, np.ndarray]) -> Iterator[dict[str, Tensor]]:
    """Values of the scheduled keywords at every point (P,), stage by stage."""
    own = {
        name: program.swept[name].cpu().numpy()
        if name in program.swept
        else np.full(program.num_points, float(program.kwargs[name]))
        for name in schedule
    }
    for stage in range(len(next(iter(schedule.values())))):
        values, reached = {}, True
        for name, array in schedule.items():
            falls = array[0] > array[-1] if len(array) > 1 else array[0] > own[name].min()
            limit = np.maximum if falls else np.minimum
            values[name] = limit(array[stage], own[name])
            reached &= bool((values[name] == own[name]).all())
        if not reached:
            yield {
                name: torch.as_tensor(x, dtype=torch.float64, device=program.device)
                for name, x in values.items()
            }


def _programs(program: LaneProgram, stages: Sequence[Mapping[str, Tensor]]) -> Iterator[LaneProgram]:
    """The program at each stage's strengths: validated and compiled as one."""
    if not stages:
        return
    kwargs = {name: x for name, x in program.kwargs.items() if name not in stages[0]}
    swept = {name: x.repeat(len(stages)) for name, x in program.swept.items()}
    values = {name: torch.cat([stage[name] for stage in stages]) for name in stages[0]}
    whole = LaneProgram(
        program.model,
        program.args,
        kwargs,
        {**swept, **values},
        device=program.device,
        dtype=program.dtype,
        seed=program.seed,
    )
    points = torch.arange(whole.num_points, device=program.device)
    for own in points.split(program.num_points):
        yield whole.take(own)


def carried(before: LaneProgram, after: LaneProgram, position: Tensor) -> Tensor:
    """Positions (P, D) in one program's coordinates where ``after`` has the same copies and other latents."""
    moved = position.clone()
    with torch.no_grad():
        for point in range(len(position)):
            with before.quiet():
                messages = before.run_lane(position[point], before.point(point)).messages
            copies = {name: msg["value"] for name, msg in messages.items() if "bayestie" in msg["infer"]}
            # The law of a tied statement may rest on one before it: as many passes as there are.
            for _ in copies:
                with after.quiet():
                    messages = after.run_lane(moved[point], after.point(point)).messages
                for name, theta in copies.items():
                    _put(after, moved[point], messages, name, theta)
    return moved


def _put(
    program: LaneProgram, position: Tensor, messages: Mapping[str, Any], name: str, theta: Tensor
) -> None:
    prior = messages[name]["infer"]["bayestie"]["prior"]
    level, z = prior.split(theta)
    values = {f"{name}_z": z, f"{name}_level": level}
    if prior.level_may_be_fixed:
        scale = prior.level_scale()
        values[f"{name}_level_z"] = torch.where(scale > 0, (level - prior.base_loc) / scale, 0.0)
    for site, value in values.items():
        if site in program.latent:
            law, where = messages[site]["fn"], program.latent[site]
            inside = biject_to(law.support).inv(value.expand(where.shape))
            position[where.slice] = inside.reshape(-1)
