"""bayestie: the sweep as one call."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks._contender import NUM_CHAINS, Contender, Progress, Setting, columns
from benchmarks._hand_written import convolution_constants


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
            keep=("posterior",),
            progress=lambda event: progress(int(event.get("strengths_done", 0))),
        )
        progress(len(strengths))
        posterior = self.tree["posterior"]
        names = self.workload.quantities
        if names == ("probability",):
            return [_probabilities(posterior.isel(sigma=i), self.data) for i in range(len(strengths))]
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


def _probabilities(posterior: Any, data: dict[str, Any]) -> np.ndarray:
    """P(digit) of every training image under each draw: weights of a net have symmetries, this has none."""
    patches = convolution_constants(data["images"].numpy())[0]
    weight, bias, head, head_bias = (
        np.asarray(posterior[name]) for name in ("conv.weight", "conv.bias", "head.weight", "head.bias")
    )
    weight = weight.reshape(*weight.shape[:4], 9)
    maps = np.einsum("npk,cdpok->cdnop", patches, weight) + np.swapaxes(bias, -1, -2)[:, :, None]
    features = np.tanh(maps).reshape(*maps.shape[:3], 36)
    logits = features @ np.swapaxes(head, -1, -2) + head_bias[:, :, None]
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return (odds / odds.sum(-1, keepdims=True)).reshape(*maps.shape[:2], -1)
