"""Does "certified" mean it? Random models, each fitted by `auto` and by a long run of NUTS from another seed.

Run: python -m benchmarks.certification [--models 200] [--seed 0] [--workers 2] [--out out/benchmarks]

A model has a tie of a random kind, form and size, a likelihood of a random family, data simulated from it
and a random strength. Posterior means and sds of every quantity are compared where `auto` says certified; a
difference counts in Monte Carlo errors of both runs, and all of them together should stay below Bonferroni's
limit at the level 0.001. Exit status 1 where they do not.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

FAMILIES = ("normal", "normal, unknown sd", "Bernoulli", "Poisson", "negative binomial", "Student-t", "gamma")
TIES = ("exchangeable", "complete", "chain", "anchored chain", "ring", "grid", "groups", "tree")
LEVEL = 0.001
LONG_ESS = 2000


def random_model(seed: int) -> tuple[str, Callable[..., None], Any]:
    """What it is, the model (of its data, None to simulate them) and its strength."""
    import torch

    import bayestie as bt

    rng = np.random.default_rng([20_260, seed])
    family, kind = rng.choice(FAMILIES), rng.choice(TIES)
    size, each = int(rng.integers(3, 11)), int(rng.integers(1, 7))
    sigma = float(np.exp(rng.uniform(np.log(0.05), np.log(3.0))))
    ties: dict[str, Callable[[], bt.Tie]] = {
        "exchangeable": lambda: bt.Tie.exchangeable(size),
        "complete": lambda: bt.Tie.complete(size),
        "chain": lambda: bt.Tie.chain(size),
        "anchored chain": lambda: bt.Tie.chain(size, anchored=True),
        "ring": lambda: bt.Tie.ring(size),
        "grid": lambda: bt.Tie.grid(2, -(-size // 2)),
        "groups": lambda: bt.Tie.groups([i % 2 for i in range(size)]),
        "tree": lambda: bt.Tie.tree([-1, *(int(rng.integers(0, i)) for i in range(1, size))]),
    }
    tie = ties[kind]()
    copies = [] if tie.has_hub else ["copies"]
    form: Any = rng.choice(["level"] if tie.anchored else ["level", "matched", *copies])
    covariate = torch.as_tensor(rng.standard_normal((each, tie.num_copies))) if rng.random() < 0.5 else None
    model = partial(_model, tie=tie, form=form, family=family, each=each, covariate=covariate)
    learned = rng.random() < 0.25
    if learned:
        model = partial(_with_unknown_strength, model=model)
    slope = ("" if covariate is None else ", slope") + (", strength unknown" if learned else "")
    what = f"{family}, {kind} of {tie.num_copies}, form {form}, {each} each{slope}, sigma {sigma:.3g}"
    return what, model, sigma


def _with_unknown_strength(y: Any, *, sigma: Any, model: Callable[..., None]) -> None:
    import pyro
    import pyro.distributions as dist

    model(y, sigma=sigma * pyro.sample("strength", dist.LogNormal(0.0, 0.5)))


def _model(y: Any, *, sigma: Any, tie: Any, form: Any, family: str, each: int, covariate: Any) -> None:
    import pyro
    import pyro.distributions as dist
    import torch

    import bayestie as bt

    predictor: Any = bt.tied("theta", tie, sigma, dist.Normal(0.3, 1.0), form=form)
    if covariate is not None:
        predictor = predictor + pyro.sample("slope", dist.Normal(0.0, 0.7)) * covariate
    if family == "normal, unknown sd":
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
    else:
        noise = torch.tensor(0.5, dtype=torch.float64)
    likelihood: dict[str, Callable[[], Any]] = {
        "normal": lambda: dist.Normal(predictor, noise),
        "normal, unknown sd": lambda: dist.Normal(predictor, noise),
        "Bernoulli": lambda: dist.Bernoulli(logits=predictor),
        "Poisson": lambda: dist.Poisson(predictor.exp()),
        "negative binomial": lambda: dist.NegativeBinomial(3.0, logits=predictor),
        "Student-t": lambda: dist.StudentT(4.0, predictor, noise),
        "gamma": lambda: dist.Gamma(2.0, 2.0 * (-predictor).exp()),
    }
    with pyro.plate("copy", tie.num_copies, dim=-1), pyro.plate("replicate", each, dim=-2):
        pyro.sample("y", likelihood[family](), obs=y)


def judged(seed: int, long_ess: float = LONG_ESS) -> dict[str, Any]:
    """One model: whether `auto` certifies it, and by how many errors its means and sds are off."""
    import pyro
    import torch
    from pyro import poutine

    import bayestie as bt

    torch.set_num_threads(1)
    begin = time.perf_counter()
    what, model, sigma = random_model(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        pyro.set_rng_seed(seed)
        trace: Any = poutine.trace(model).get_trace(None, sigma=torch.tensor(sigma))
    finally:
        torch.set_default_dtype(before)
    y = trace.nodes["y"]["value"]
    auto = bt.fit(model, y, sigma=sigma, seed=seed, keep=("posterior",))
    found: dict[str, Any] = {"what": what}
    found |= {"engine": str(auto.sweep.engine.item()), "reason": str(auto.sweep.reason.item())}
    found["certified"] = bool(auto.sweep.certified)
    if found["certified"]:
        draws = int(np.ceil(long_ess / 4))
        long = bt.fit(
            model, y, sigma=sigma, seed=seed + 1_000_000, engine="nuts", num_draws=draws, target_ess=long_ess,
            keep=("posterior",),
        )  # fmt: skip
        found["long_certified"] = bool(long.sweep.certified)
        scores = _scores(auto, long)
        found["comparisons"], found["worst"] = len(scores), float(np.abs(scores).max())
    return {**found, "seconds": time.perf_counter() - begin}


def _scores(auto: Any, long: Any) -> np.ndarray:
    """Differences of means and of sds in errors of both, all quantities that move."""
    names = [name for name in auto.posterior.data_vars if name in long.posterior.data_vars]
    moments = [_moments(tree, names) for tree in (auto, long)]
    moving = np.minimum(*(sd for _, _, sd, _ in moments)) > 1e-12
    (a, a_error, b, b_error), (c, c_error, d, d_error) = moments
    pairs = ((a - c, np.hypot(a_error, c_error)), (b - d, np.hypot(b_error, d_error)))
    return np.concatenate([(gap / error)[moving] for gap, error in pairs])


def _moments(tree: Any, names: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Means and sds of all columns, each with its error."""
    from arviz_stats.base import array_stats

    columns = [tree.posterior[name].transpose("chain", "draw", ...).values for name in names]
    x = np.concatenate([c.reshape(*c.shape[:2], -1) for c in columns], -1)
    mean, sd = x.mean((0, 1)), x.std((0, 1))
    weights = float(tree.sweep.ess_weights)

    def error(values: np.ndarray) -> np.ndarray:
        size: Any = array_stats.ess(values, chain_axis=0, draw_axis=1, method="mean")
        return values.std((0, 1)) * np.sqrt(1.0 / size + 1.0 / weights)

    return mean, error(x), sd, error((x - mean) ** 2) / (2.0 * np.maximum(sd, 1e-300))


def main(argv: Sequence[str] | None = None) -> int:
    """Judge the models, print one table, write certification.json; 1 where a certificate was wrong."""
    from scipy.stats import norm

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.certification", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--models", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first model (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--ess", type=float, default=LONG_ESS, help="of the long runs (default: 2000)")
    parser.add_argument("--out", type=Path, default=Path("out") / "benchmarks")
    given = parser.parse_args(argv)
    seeds = range(given.seed, given.seed + given.models)
    judge = partial(judged, long_ess=given.ess)
    given.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    console = Console()
    with ExitStack() as stack, (given.out / "certification.jsonl").open("a") as lines:

        def done(seed: int, result: dict[str, Any]) -> None:
            results.append({"seed": seed, **result})
            lines.write(json.dumps(results[-1]) + "\n")  # an interrupt loses nothing that is done
            lines.flush()

        if given.workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(given.workers, mp_context=context))
            running = {pool.submit(judge, seed): seed for seed in seeds}
            for future in as_completed(running):
                done(running[future], future.result())
        else:
            for seed in seeds:
                done(seed, judge(seed))
    results.sort(key=lambda r: r["seed"])
    sure = [r for r in results if r["certified"]]
    compared = [r for r in sure if r["long_certified"]]
    count = sum(r["comparisons"] for r in compared)
    limit = float(norm.isf(LEVEL / (2 * count))) if count else np.inf
    worst = max((r["worst"] for r in compared), default=0.0)
    table = Table("", "", title='"certified" against long runs')
    for words, value in (
        ("models", len(results)),
        ("certified", len(sure)),
        ("of them by laplace", sum(r["engine"] == "laplace" for r in sure)),
        ("refused", len(results) - len(sure)),
        ("long run not certified, left out", len(sure) - len(compared)),
        ("means and sds compared", count),
        ("largest |z|", f"{worst:.2f}"),
        (f"limit at level {LEVEL}", f"{limit:.2f}"),
        ("models beyond it", sum(r["worst"] > limit for r in compared)),
    ):
        table.add_row(words, str(value))
    console.print(table)
    for result in results:
        if not result["certified"] or result.get("worst", 0.0) > limit:
            console.print(f"{result['what']}: {result['reason']}, |z| {result.get('worst', np.nan):.2f}")
    summary = {"limit": limit, "largest": worst, "comparisons": count, "results": results}
    (given.out / "certification.json").write_text(json.dumps(summary, indent=1))
    return int(worst > limit)


if __name__ == "__main__":
    raise SystemExit(main())
