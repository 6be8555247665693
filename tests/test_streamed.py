"""Sums over draws that are not kept: compiled or by numpy, and beside the draws themselves."""

import numpy as np
import pytest

from bayestie._engines import _streamed
from bayestie._engines._streamed import QUANTILES, Streamed

SIZE, CHAINS, JOINED, DRAWS = 7, 4, 2, 400


def seen(monkeypatch, *, compiled: bool, histogram: bool = True) -> tuple[Streamed, np.ndarray]:
    monkeypatch.setattr(_streamed, "_WORTH_COMPILING", 1 if compiled else 10**9)
    rng = np.random.default_rng(3)
    centre, scale = rng.normal(size=SIZE), np.exp(rng.normal(size=SIZE))
    scale[2] = 0.0  # a quantity that stands still
    streamed = Streamed(centre, scale, CHAINS, 25, histogram=histogram, joined=JOINED)
    steps = rng.standard_t(3, size=(DRAWS, CHAINS, SIZE)) * scale
    for draw in steps:
        for group in range(CHAINS // JOINED):
            chains = slice(group * JOINED, (group + 1) * JOINED)
            streamed.add(chains, draw[chains])
    return streamed, centre + steps.reshape(-1, SIZE)


@pytest.mark.parametrize("histogram", [True, False])
def test_the_compiled_sums_are_those_of_numpy(monkeypatch, histogram):
    compiled, plain = (seen(monkeypatch, compiled=c, histogram=histogram)[0] for c in (True, False))
    for name in ("total", "squares", "running", "histogram", "seen", "count"):
        np.testing.assert_array_equal(getattr(compiled, name), getattr(plain, name), err_msg=name)
    for ours, theirs in zip(compiled.quality(), plain.quality(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("together", [3, 65_536])
def test_moments_and_quantiles_are_those_of_the_draws(monkeypatch, together):
    monkeypatch.setattr(_streamed, "_TOGETHER", together)
    streamed, draws = seen(monkeypatch, compiled=True)
    summary = streamed.summary()
    np.testing.assert_allclose(summary.mean, draws.mean(0), rtol=1e-12)
    np.testing.assert_allclose(summary.sd, draws.std(0, ddof=1), rtol=1e-9, atol=1e-12)
    width = 12.0 / 96 * streamed.scale  # of a bin
    wanted = np.quantile(draws, QUANTILES, axis=0)
    assert (np.abs(summary.quantiles - wanted) <= 1.01 * width).all()
