"""NumPyro: a loop over strengths and chains, and everything as one vmapped program."""

# pyright: reportMissingImports=false

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _hand_written
from benchmarks._contender import NUM_CHAINS, Contender, Progress, Setting, columns
from benchmarks._hand_written import Language
from benchmarks._workloads import load_arrays

BLOCK = 50


class _NumPyro(Contender):
    """Draws come in blocks, so that one compiled program serves every number of draws."""

    def prepare(self, arrays: Path) -> None:
        import jax
        import numpyro
        from numpyro.infer import NUTS

        numpyro.enable_x64()  # as the others
        self.jax = jax
        self.model = hand_written_model(self.workload.model)
        self.data = {
            name: x if isinstance(x, int) else jax.numpy.asarray(x) for name, x in load_arrays(arrays).items()
        }
        # The kernel keeps what it learns of the model at its first call, `start`.
        self.kernel = NUTS(self.model)
        self.start, self.block = self.programs()

    def _start(self, key: Any, sigma: Any, centred: Any, warmup: int) -> Any:
        """The state after warmup; `warmup` is static."""
        keywords = {**self.data, "sigma": sigma, "centred": centred}
        state = self.kernel.init(key, warmup, None, (), keywords)
        return self.jax.lax.fori_loop(0, warmup, lambda _, s: self.kernel.sample(s, (), keywords), state)

    def _block(self, state: Any, sigma: Any, centred: Any) -> Any:
        keywords = {**self.data, "sigma": sigma, "centred": centred}
        finish = self.kernel.postprocess_fn((), keywords)

        def step(state, _):
            state = self.kernel.sample(state, (), keywords)
            values = finish(state.z)
            return state, {name: values[name] for name in self.workload.quantities}

        return self.jax.lax.scan(step, state, None, length=BLOCK)

    def programs(self) -> tuple[Any, Any]:
        raise NotImplementedError


class NumPyroLoop(_NumPyro):
    """Strength after strength; a strength's chains run on all cores, none waiting for another's tree.

    The compiled programs take sigma as data, which NumPyro's own MCMC class cannot carry from one number
    of draws to the next: the kernel is driven directly, as its documentation shows.
    """

    def programs(self):
        return self.jax.jit(self._start, static_argnums=3), self.jax.jit(self._block)

    def run(self, strengths: list[float], settings: list[Setting], progress: Progress) -> list[np.ndarray]:
        keys = self.jax.random.split(self.jax.random.PRNGKey(self.seed), NUM_CHAINS)
        found = []
        with ThreadPoolExecutor(min(NUM_CHAINS, len(os.sched_getaffinity(0)))) as pool:
            for i, (sigma, setting) in enumerate(zip(strengths, settings, strict=True)):
                found.append(np.stack(list(pool.map(partial(self._chain, sigma, setting), keys))))
                progress(i + 1)
        return found

    def _chain(self, sigma: float, setting: Setting, key: Any) -> np.ndarray:
        centred = float(setting.centred)
        state = self.start(key, sigma, centred, setting.warmup)
        blocks = []
        for _ in range(-(-setting.draws // BLOCK)):
            state, block = self.block(state, sigma, centred)
            blocks.append(
                columns({n: np.asarray(x)[None] for n, x in block.items()}, self.workload.quantities)
            )
        return np.concatenate(blocks, 1)[0, : setting.draws]


class NumPyroVmap(_NumPyro):
    """All strengths and chains as lanes of one program; every lane waits for the longest tree of a step."""

    together = True

    def programs(self):
        def start(key, sigma, centred, warmup):
            return self.jax.vmap(lambda k, s, c: self._start(k, s, c, warmup))(key, sigma, centred)

        return self.jax.jit(start, static_argnums=3), self.jax.jit(self.jax.vmap(self._block))

    def run(self, strengths: list[float], settings: list[Setting], progress: Progress) -> list[np.ndarray]:
        lanes = [(s, float(t.centred)) for s, t in zip(strengths, settings, strict=True)]
        sigma, centred = (np.repeat(x, NUM_CHAINS) for x in zip(*lanes, strict=True))
        keys = self.jax.random.split(self.jax.random.PRNGKey(self.seed), len(sigma))
        draws = max(setting.draws for setting in settings)
        state = self.start(keys, sigma, centred, max(setting.warmup for setting in settings))
        blocks = []
        for _ in range(-(-draws // BLOCK)):
            state, block = self.block(state, sigma, centred)
            blocks.append(columns({n: np.asarray(x) for n, x in block.items()}, self.workload.quantities))
        every = np.concatenate(blocks, 1)[:, :draws]  # (lanes, draws, quantities)
        progress(len(strengths))
        return list(every.reshape(len(strengths), NUM_CHAINS, draws, -1))


def hand_written_model(name: str) -> Any:
    """The hand-written model of this name, in NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    ppl = Language(dist, numpyro.sample, numpyro.deterministic, numpyro.factor, jnp, jnp.asarray)
    return partial(getattr(_hand_written, name), ppl)
