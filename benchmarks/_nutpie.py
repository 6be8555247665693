"""PyMC with nutpie's sampler: compiled once, `with_data` per strength."""

# pyright: reportMissingImports=false

import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._contender import NUM_CHAINS, Contender, Progress, Setting, columns
from benchmarks._workloads import load_arrays


class NutpieLoop(Contender):
    """Strength after strength, the chains of a strength on all cores."""

    def prepare(self, arrays: Path) -> None:
        import nutpie

        from benchmarks import _pymc_models

        self.nutpie, self.build = nutpie, _pymc_models.build
        self.data = load_arrays(arrays)
        self.compiled: Any = None

    def run(self, strengths: list[float], settings: list[Setting], progress: Progress) -> list[np.ndarray]:
        if self.compiled is None:  # the first call compiles, as a user's would
            model = self.build(self.workload.model, self.data)
            self.compiled = self.nutpie.compile_pymc_model(model, var_names=list(self.workload.quantities))
        found = []
        for i, (sigma, setting) in enumerate(zip(strengths, settings, strict=True)):
            bound = self.compiled.with_data(sigma=np.array(sigma), centred=np.array(float(setting.centred)))
            tree = self.nutpie.sample(
                bound,
                draws=setting.draws,
                tune=setting.warmup,
                chains=NUM_CHAINS,
                cores=len(os.sched_getaffinity(0)),
                seed=self.seed,
                progress_bar=False,
            )
            found.append(columns(tree.posterior, self.workload.quantities))
            progress(i + 1)
        return found
