"""Pyro's NUTS, one chain after another, on the hand-written models."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _hand_written
from benchmarks._contender import NUM_CHAINS, Contender, Progress, Setting, columns
from benchmarks._hand_written import Language
from benchmarks._workloads import load_arrays


class PyroNUTS(Contender):
    """Strength after strength, chain after chain."""

    def prepare(self, arrays: Path) -> None:
        import pyro
        import torch
        from pyro.infer import MCMC, NUTS

        torch.set_default_dtype(torch.float64)
        pyro.enable_validation(False)
        self.pyro, self.mcmc, self.nuts = pyro, MCMC, NUTS
        self.model = hand_written_model(self.workload.model)
        self.data = {
            name: x if isinstance(x, int) else torch.as_tensor(x) for name, x in load_arrays(arrays).items()
        }

    def run(self, strengths: list[float], settings: list[Setting], progress: Progress) -> list[np.ndarray]:
        found = []
        for i, (sigma, setting) in enumerate(zip(strengths, settings, strict=True)):
            self.pyro.set_rng_seed(self.seed)
            chains = [self._chain(sigma, setting) for _ in range(NUM_CHAINS)]
            found.append(np.concatenate(chains))
            progress(i + 1)
        return found

    def _chain(self, sigma: float, setting: Setting) -> np.ndarray:
        kernel = self.nuts(self.model)
        run = self.mcmc(kernel, num_samples=setting.draws, warmup_steps=setting.warmup, disable_progbar=True)
        keywords = {**self.data, "sigma": sigma, "centred": float(setting.centred)}
        run.run(**keywords)
        latents = run.get_samples()
        predictive: Any = self.pyro.infer.Predictive(
            self.model, latents,
            return_sites=self.workload.quantities,
        )  # fmt: skip
        values = {**latents, **predictive(**keywords)}
        return columns(
            {name: x.detach().numpy()[None] for name, x in values.items()}, self.workload.quantities
        )


def hand_written_model(name: str) -> Any:
    """The hand-written model of this name, in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    ppl = Language(dist, pyro.sample, pyro.deterministic, pyro.factor, torch, torch.as_tensor)
    return partial(getattr(_hand_written, name), ppl)
