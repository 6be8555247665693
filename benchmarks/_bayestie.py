"""bayestie: the sweep as one call."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks._contender import NUM_CHAINS, Contender, Progress, Setting, columns


class Sweep(Contender):
    """`bayestie.sweep` with the default engine; the draws are kept, as the peers keep theirs."""

    together = True
    parametrisations = (0,)
    engine: ClassVar[str] = "auto"

    def prepare(self, arrays: Path) -> None:
        import bayestie

        self.sweep = bayestie.sweep
        self.model, self.data = self.workload.function(), self.workload.data()
        self.tree: Any = None

    def run(self, strengths: list[float], settings: list[Setting], progress: Progress) -> list[np.ndarray]:
        self.tree = self.sweep(
            self.model,
            **self.data,
            over={"sigma": strengths},
            engine=self.engine,
            seed=self.seed,
            num_chains=NUM_CHAINS,
            num_draws=max(setting.draws for setting in settings),
            monitor=self.workload.monitor or None,
            keep=("posterior",),
            progress=lambda event: progress(int(event.get("strengths_done", 0))),
        )
        progress(len(strengths))
        posterior = self.tree["posterior"]
        names = self.workload.quantities
        found = {name: np.asarray(posterior[name].transpose("sigma", ...)) for name in names}
        return [columns({n: x[i] for n, x in found.items()}, names) for i in range(len(strengths))]

    def claims(self) -> dict[str, Any]:
        said = self.tree["sweep"]
        return {
            "engine": [str(x) for x in said["engine"].values],
            "certified": [bool(x) for x in said["certified"].values],
            # Draws resampled by importance carry the ESS of their weights, which only the sweep knows.
            "min_ess": np.minimum(said["min_ess_bulk"].values, said["min_ess_tail"].values).tolist(),
            "density_route": str(self.tree.attrs.get("density_route")),
        }


class SweepNUTS(Sweep):
    """The engine nuts alone."""

    engine = "nuts"
