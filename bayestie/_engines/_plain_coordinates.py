"""Where chains walk if no mode is looked for: latents by themselves, each in a scale of its own."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayestie._engines._laplace_fit import MANY_LATENTS
from bayestie._engines._protocol import Task
from bayestie._engines._trajectories import Trajectories

if TYPE_CHECKING:
    from bayestie._engines._lanes import Momenta


@dataclass
class PlainCoordinates:
    """u = scale z at each of the points (P,); scale (P, D)."""

    task: Task
    points: Tensor
    scale: Tensor

    def take(self, index: Tensor) -> "PlainCoordinates":
        """Some of the points."""
        return PlainCoordinates(self.task, self.points[index], self.scale[index])

    def to_position(self, z: Tensor) -> Tensor:
        """(P, batch, D) -> (P, batch, num_latent)."""
        return z * self.scale.unsqueeze(1)

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log density of u (P, batch); that of z but for a constant, and its gradient by z."""
        value, grad = self.task.density.value_and_grad(self.points, self.to_position(z))
        return value, value, grad * self.scale.unsqueeze(1)

    def whole_ticks(self, state: Trajectories, uniforms: Tensor, momenta: "Momenta") -> None:
        """None: the model's own program is all there is."""
        return


def plain_coordinates(task: Task, points: Tensor) -> PlainCoordinates:
    """With the scales that latents have before anything is known of them."""
    scale = torch.ones(len(points), task.density.num_latent, dtype=task.program.dtype)
    return PlainCoordinates(task, points, scale.to(points.device))


def is_many(task: Task) -> bool:
    """Whether latents are many, and in no linear predictor: a net, as a rule."""
    return task.density.route == "program" and task.density.num_latent > MANY_LATENTS


def has_no_use_for_a_mode(task: Task) -> bool:
    """Whether they are, and not what the user wants to know.

    A net has as many modes as its units have orders and signs, and most of the posterior is near none of
    them: the Gaussian at one, dear to find, would be believed by no check.
    """
    return bool(task.monitor) and is_many(task)
