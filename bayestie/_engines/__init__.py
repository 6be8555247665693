"""Ways to get draws: one file each, one small protocol."""

from bayestie._engines._laplace import run_laplace
from bayestie._engines._nuts import run_nuts
from bayestie._engines._protocol import Draws, Task
