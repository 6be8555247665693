"""Ways to get draws: one file each, one small protocol."""

from bayestie._engines._laplace import LaplaceFit, run_laplace
from bayestie._engines._nuts import run_nuts
from bayestie._engines._protocol import Draws, Interrupted, Task

__all__ = ["Draws", "Interrupted", "LaplaceFit", "Task", "run_laplace", "run_nuts"]
