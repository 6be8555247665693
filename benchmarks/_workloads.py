"""What is timed: a model, its data, the strengths and the quantities that must be known well.

Imports neither torch nor a peer: a contender's process must carry its own libraries only.
"""

import math
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

LABELS = ("coords", "dims")


@dataclass(frozen=True)
class Workload:
    """A model swept over strengths.

    Attributes:
        name: short name, as on the command line.
        title: what it is, for tables.
        model: module of `models/` and the function of the same name.
        low, high, num: strengths, log-spaced.
        quantities: variables whose every element must reach the ESS and R-hat asked for.
        data_options: arguments of the model file's `data`.
        monitor: of these alone bayestie is to judge its chains; all of its variables where empty.
    """

    name: str
    title: str
    model: str
    low: float
    high: float
    num: int
    quantities: tuple[str, ...]
    data_options: dict[str, Any] = field(default_factory=dict)
    monitor: tuple[str, ...] = ()

    @property
    def strengths(self) -> list[float]:
        if self.num == 1:
            return [self.low]
        step = math.log(self.high / self.low) / (self.num - 1)
        return [self.low * math.exp(i * step) for i in range(self.num)]

    def function(self) -> Any:
        """The Pyro model, as a user of bayestie writes it."""
        return getattr(import_module(f"models.{self.model}"), self.model)

    def data(self) -> dict[str, Any]:
        """Arguments for `bayestie.sweep`, labels included."""
        return import_module(f"models.{self.model}").data(**self.data_options)

    def save_arrays(self, path: Path) -> None:
        """The data alone, for peers: they import no torch to read it."""
        data = {name: value for name, value in self.data().items() if name not in LABELS}
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in data.items()}
        np.savez(path, **arrays)

    def shortened(self, num: int | None, smoke: bool) -> "Workload":
        """The same with `num` strengths; with little data where the data have a size."""
        short = {"num_steps": 30} if smoke and "num_steps" in self.data_options else {}
        return replace(self, num=num or self.num, data_options={**self.data_options, **short})


def load_arrays(path: Path) -> dict[str, Any]:
    """Arrays as saved by `save_arrays`; whole numbers (counts of copies) as int."""
    with np.load(path) as file:
        return {name: int(file[name]) if file[name].ndim == 0 else file[name] for name in file.files}


_ALL = (
    Workload("W1", "eight schools", "eight_schools", 0.1, 30.0, 16, ("theta", "theta_level")),
    Workload(
        "W2", "Contraception", "contraception", 0.1, 30.0, 16,
        ("intercept", "intercept_level", "age_slope", "urban_effect"),
    ),
    Workload("W3", "radon, intercept and slope", "radon", 0.03, 3.0, 16, ("line", "line_level", "noise_sd")),
    Workload(
        "W4", "Poisson chain of 1,000", "poisson_chain", 0.01, 1.0, 8, ("log_rate",), {"num_steps": 1_000}
    ),
    Workload(
        "W4-large", "Poisson chain of 100,000", "poisson_chain", 0.02, 0.5, 4, ("log_rate",),
        {"num_steps": 100_000},
    ),
    Workload(
        "W5", "soft convolution on digits", "soft_convolution", 0.05, 2.0, 4, ("probability",), {"num": 100},
        ("probability",),
    ),
    Workload(
        "W6", "InstEval, crossed effects", "inst_eval", 0.1, 1.0, 4,
        ("students", "lecturers", "lecturers_level", "service_effect", "noise_sd"),
    ),
)  # fmt: skip
WORKLOADS = {workload.name: workload for workload in _ALL}
