"""Pyro's own NUTS and SVI, untouched: the references that our engines must agree with.

Points and chains run one after another, each with its own random numbers and parameter store; the caller's
are left as they were.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)
from pyro.optim import ClippedAdam, PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.distributions import biject_to

from bayestie._engines._importance import ImportancePool, needed_ess
from bayestie._engines._protocol import Draws, Interrupted, Task
from bayestie._engines._quality import chain_verdict, quality
from bayestie._errors import InferenceError, OptionError
from bayestie._program import LaneProgram
from bayestie._run_context import model_defaults
from bayestie._vmap_mends import every_row

WARMUP = 500
NUM_STEPS, LEARNING_RATE, LAST_RATE = 2000, 0.05, 0.01  # the rate falls to a hundredth of its start
MAX_POOL = 4  # draws from a guide at most, in multiples of what is stored
STREAM = 401
PROGRESS_EVERY = 100  # iterations between progress events
GUIDES: dict[str, Callable[[Any], Any]] = {
    "mean_field": AutoDiagonalNormal,
    "low_rank": AutoLowRankMultivariateNormal,
    "full_rank": AutoMultivariateNormal,
}


@contextlib.contextmanager
def _own_world(task: Task, *key: int) -> Iterator[None]:
    """Random numbers, parameter store and default dtype of our own; the caller's come back afterwards."""
    program, store = task.program, pyro.get_param_store()
    state = store.get_state()
    own: Any = {
        "params": {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in state["params"].items()},
        "constraints": dict(state["constraints"]),
    }
    random_state = get_rng_state()
    devices = [program.device] if program.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            store.scope(own),
            model_defaults(program.dtype, program.device),
        ):
            pyro.set_rng_seed(int(task.generator(STREAM, *key).integers(2**31)))
            yield
    finally:
        set_rng_state(random_state)


class _Unconstrain(Messenger):
    """Puts given values at the latent sites and takes them to the real line.

    Entered first, as `_Lane` of the program is; supports that depend on other sites are read from the run.
    """

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values
        self.flat: dict[str, Tensor] = {}
        self.log_jacobian: Any = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"] or name not in self.values:
            return
        value = self.values[name]
        transform = biject_to(msg["fn"].support)
        x = transform.inv(value)
        self.flat[name] = x.reshape(-1)
        self.log_jacobian = self.log_jacobian + transform.log_abs_det_jacobian(x, value).sum()
        msg["value"], msg["done"] = value, True


def _keywords(program: LaneProgram, point: int) -> dict[str, Any]:
    return program.kwargs | {name: values[point] for name, values in program.swept.items()}


def _unconstrained(
    program: LaneProgram, point: int, names: list[str], values: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Constrained values (n, ...) of the latent sites -> positions (n, D), log |d value / d position|."""
    keywords = _keywords(program, point)

    def one(*row: Tensor) -> tuple[Tensor, Tensor]:
        handler = _Unconstrain(dict(zip(names, row, strict=True)))
        with handler:
            program.model(*program.args, **keywords)
        return torch.cat([handler.flat[name] for name in program.latent]), handler.log_jacobian

    with torch.no_grad(), program.quiet():
        try:
            return torch.vmap(one, randomness="different")(*values)
        except (RuntimeError, ValueError, NotImplementedError, TypeError):  # what vmap cannot do, a loop can
            outputs = [one(*row) for row in zip(*values, strict=True)]
            return torch.stack([x for x, _ in outputs]), torch.stack([x for _, x in outputs])


def _whole(task: Task, name: str, default: int) -> int:
    value = task.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(name, found=repr(value), expected="a whole number of at least 1", fix="Raise it.")
    return value


# -- NUTS ----------------------------------------------------------------------------------------------


def run_pyro_nuts(task: Task, points: Tensor | None = None) -> Draws:
    """Draws by ``pyro.infer.NUTS`` at ``points`` (all by default), with Pyro's defaults.

    Certified as our own chains are: R-hat below 1.01, bulk and tail effective sample size at least
    ``target_ess`` for every latent and posterior variable, at most one trajectory in a thousand divergent.
    Exactly ``num_draws`` per chain are drawn: ask for more draws where the effective sample size is short.

    Options of the task: ``warmup`` iterations per chain (default 500).
    """
    points = task.points if points is None else points
    warmup = _whole(task, "warmup", WARMUP)
    total = len(points) * task.num_chains * task.num_draws
    parts: list[Draws] = []
    try:
        for i, point in enumerate(points.tolist()):
            done = i * task.num_chains * task.num_draws
            parts.append(_nuts_point(task, point, warmup, done, total))
    except KeyboardInterrupt as interrupt:
        if not parts:
            raise
        raise Interrupted(_join(parts)) from interrupt
    return _join(parts)


def _nuts_point(task: Task, point: int, warmup: int, done: int, total: int) -> Draws:
    begin = time.perf_counter()
    chains = [
        _nuts_chain(task, point, chain, warmup, done + chain * task.num_draws, total)
        for chain in range(task.num_chains)
    ]
    position = torch.stack([x for x, _ in chains])
    stats = {name: torch.stack([s[name] for _, s in chains]) for name in chains[0][1]}
    at = torch.tensor([point], device=task.program.device)
    log_density = task.density.value(at, position.reshape(1, -1, position.shape[-1]))
    log_density = log_density.reshape(1, *position.shape[:2])
    judged = position
    if task.quantities is not None:
        judged = task.quantities(at, position.unsqueeze(0))[0]
        judged = judged if task.monitor else torch.cat([position, judged], -1)
    found = quality(judged)
    divergences = int(stats["diverging"].sum())
    certified, reason = chain_verdict(
        found, divergences, stats["diverging"].numel(), task.target_ess, task.monitor
    )
    infinite, nan = log_density.new_full((1,), torch.inf), log_density.new_full((1,), torch.nan)
    return Draws(
        points=at,
        position=position.unsqueeze(0),
        log_density=log_density,
        engine=["pyro_nuts"],
        certified=[certified],
        reason=[reason],
        exact=[False],
        khat=infinite,
        ess_weights=infinite.clone(),
        log_evidence=nan,
        log_evidence_error=nan.clone(),
        seconds=torch.tensor([time.perf_counter() - begin], dtype=torch.float64),
        quality=torch.tensor([found[:3]], dtype=torch.float64),
        divergences=torch.tensor([divergences]),
        stats={name: x.unsqueeze(0) for name, x in stats.items()},
    )


def _nuts_chain(
    task: Task, point: int, chain: int, warmup: int, done: int, total: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Positions (draws, D) and statistics (draws,) of one chain."""
    program, accept = task.program, 0.0

    def report(kernel: Any, _: Any, stage: str, i: int) -> None:
        nonlocal accept
        sampling = stage.startswith("Sample")
        if sampling:
            accept = float(kernel.logging()["acc. prob"])  # Pyro keeps the running mean only
        if i % PROGRESS_EVERY == 0:
            task.progress(
                {
                    "stage": "pyro_nuts" if sampling else "pyro_nuts warmup",
                    "draws_done": done + i * sampling,
                    "draws_total": total,
                    "message": f"point {point + 1}, chain {chain + 1}, iteration {i + 1}",
                }
            )

    with _own_world(task, 0, point, chain), every_row():
        kernel = NUTS(program.model)
        mcmc = MCMC(
            kernel,
            num_samples=task.num_draws,
            warmup_steps=warmup,
            num_chains=1,
            disable_progbar=True,
            hook_fn=report,
        )
        mcmc.run(*program.args, **_keywords(program, point))
        samples = mcmc.get_samples()
        names = list(program.latent)
        position, _ = _unconstrained(program, point, names, [samples[name] for name in names])
        diverging = torch.zeros(task.num_draws, dtype=torch.bool, device=position.device)
        # Pyro counts some divergences of the last warmup iteration as draw -1.
        diverging[[d for d in mcmc.diagnostics()["divergences"]["chain 0"] if 0 <= d < task.num_draws]] = True
        step = float(kernel.step_size)
    stats = {
        "acceptance_rate": position.new_full((task.num_draws,), accept),
        "step_size": position.new_full((task.num_draws,), step),
        "diverging": diverging,
    }
    return position, stats


def _join(parts: list[Draws]) -> Draws:
    joined: dict[str, Any] = {}
    for name, first in vars(parts[0]).items():
        values = [getattr(part, name) for part in parts]
        if isinstance(first, Tensor):
            joined[name] = torch.cat(values)
        elif isinstance(first, dict):
            joined[name] = {key: torch.cat([v[key] for v in values]) for key in first}
        else:
            joined[name] = [x for value in values for x in value]
    return Draws(**joined)


# -- SVI -----------------------------------------------------------------------------------------------


def run_pyro_svi(task: Task, points: Tensor | None = None) -> Draws:
    """Draws from a guide fitted by ``pyro.infer.SVI`` at ``points`` (all by default).

    Certified by the rule of our own svi: khat of log p - log q below 0.7 and enough effective sample size
    of these weights, and then resampled by them; elsewhere the draws are the guide's own and ``reason``
    says so. A guide that is a point mass, or has random sites of its own, has no such weights (khat is
    infinite) and is never certified. Parameters of the model itself (``pyro.param``) are held fixed.

    Options of the task: ``guide``, "mean_field" (AutoDiagonalNormal, the default), "low_rank",
    "full_rank", a factory ``guide(model)`` such as any AutoGuide class, or a guide module (copied for every
    point); ``num_steps`` (2000); ``learning_rate`` (0.05, falling to a hundredth of it); ``optim``, a
    factory of a Pyro optimiser in place of ClippedAdam; ``num_particles`` (1) of the ELBO estimate.
    """
    points = task.points if points is None else points
    parts: list[Draws] = []
    try:
        for point in points.tolist():
            parts.append(_svi_point(task, point))
    except KeyboardInterrupt as interrupt:
        if not parts:
            raise
        raise Interrupted(_join(parts)) from interrupt
    return _join(parts)


def _make_guide(task: Task, model: Callable[..., Any]) -> Callable[..., Any]:
    asked = task.options.get("guide") or "mean_field"
    if isinstance(asked, torch.nn.Module):
        return copy.deepcopy(asked)
    factory = GUIDES.get(asked) if isinstance(asked, str) else asked
    guide = factory(model) if callable(factory) else None
    if not callable(guide):
        raise OptionError(
            "guide",
            found=repr(asked) if guide is None else f"a factory that returned {type(guide).__name__}",
            expected=f"one of {', '.join(GUIDES)}, a factory guide(model), or a guide module",
            fix="For a guide function write guide=lambda model: my_guide.",
        )
    return guide


def _optimiser(task: Task, num_steps: int) -> Any:
    asked = task.options.get("optim")
    if isinstance(asked, PyroOptim):
        return copy.deepcopy(asked)
    if asked is not None:
        return asked()
    rate = task.options.get("learning_rate", LEARNING_RATE)
    return ClippedAdam({"lr": rate, "lrd": LAST_RATE ** (1.0 / num_steps)})


def _svi_point(task: Task, point: int) -> Draws:
    begin, program = time.perf_counter(), task.program
    num_steps = _whole(task, "num_steps", NUM_STEPS)
    keywords = _keywords(program, point)
    with _own_world(task, 1, point):
        # The density that judges the guide has the model's parameters as they are.
        model = poutine.block(program.model, hide_types=["param"])
        guide = _make_guide(task, poutine.block(model, hide=program.enumerated))
        loss = _fit_guide(task, point, model, guide, num_steps, keywords)
        at = torch.tensor([point], device=program.device)
        needed, row = needed_ess(task), torch.zeros(1, dtype=torch.long, device=program.device)
        position, log_q, doubt = _guide_draws(task, point, guide, keywords)
        if doubt is None and not math.isfinite(loss):
            doubt = "the ELBO was not finite at the last step"
        pool = ImportancePool(task, at, [doubt], stream=STREAM + 1)
        pool.add(row, position.unsqueeze(0), log_q.unsqueeze(0))
        while doubt is None and pool.khat < 0.8 and pool.ess < needed and pool.rounds[0] < MAX_POOL:
            position, log_q, _ = _guide_draws(task, point, guide, keywords)
            pool.add(row, position.unsqueeze(0), log_q.unsqueeze(0))
    draws = pool.draws("pyro_svi", time.perf_counter() - begin, needed, always_resample=False)
    if doubt is not None:
        draws.khat[:] = torch.inf
        draws.ess_weights[:] = 0.0
        draws.log_evidence[:] = draws.log_evidence_error[:] = torch.nan
    own = "" if draws.certified[0] else "; the draws are the guide's, not the posterior's"
    draws.reason[0] += (
        f"; {type(guide).__name__} after {num_steps} steps, last ELBO estimate {-loss:.6g}{own}"
    )
    return draws


def _fit_guide(
    task: Task, point: int, model: Any, guide: Any, num_steps: int, keywords: dict[str, Any]
) -> float:
    """The last loss."""
    program, particles = task.program, _whole(task, "num_particles", 1)
    elbo: Any = Trace_ELBO(num_particles=particles)
    if program.enumerated:
        model = config_enumerate(model)
        elbo = TraceEnum_ELBO(num_particles=particles, max_plate_nesting=program.max_plate_nesting)
    svi = SVI(model, guide, _optimiser(task, num_steps), loss=elbo)
    loss = float("nan")
    try:
        for step in range(num_steps):
            estimate: Any = svi.step(*program.args, **keywords)
            loss = float(estimate)
            if step % PROGRESS_EVERY == 0:
                message = f"point {point + 1}, step {step} of {num_steps}, ELBO {-loss:.6g}"
                task.progress(
                    {
                        "stage": "pyro_svi",
                        "strengths_done": point,
                        "strengths_total": task.num_points,
                        "message": message,
                    }
                )
    except NotImplementedError as error:
        raise InferenceError(
            "engine 'pyro_svi'",
            found=f"{type(guide).__name__} refusing the model: {error}",
            expected="a model that Pyro's guide can serve",
            fix="Pass a guide of your own, or use engine='svi'.",
        ) from error
    return loss


def _guide_draws(
    task: Task, point: int, guide: Any, keywords: dict[str, Any]
) -> tuple[Tensor, Tensor, str | None]:
    """Positions (n, D) and log q there (n,), both in the unconstrained space; why q is not known, if so."""
    program, wanted = task.program, task.num_chains * task.num_draws
    with torch.no_grad():
        first = poutine.trace(guide).get_trace(*program.args, **keywords)
    nodes = dict(first.iter_stochastic_nodes())
    missing = [name for name in program.latent if name not in nodes]
    if missing:
        raise OptionError(
            "guide",
            found=f"no statement for latent site '{missing[0]}'",
            expected=f"one for each of {list(program.latent)}",
            fix="Sample every latent site of the model in the guide.",
        )
    names = list(program.latent)
    rows, log_q = [], []
    with torch.no_grad(), program.quiet():
        for _ in range(wanted):  # torch's in-place normals cannot be vectorised
            trace = poutine.trace(guide).get_trace(*program.args, **keywords)
            rows.append([trace.nodes[name]["value"] for name in names])
            # Auxiliary sites and the Delta sites they feed add up to the density of the constrained values.
            log_q.append(trace.log_prob_sum())
    values = [torch.stack(column) for column in zip(*rows, strict=True)]
    position, log_jacobian = _unconstrained(program, point, names, values)
    return position, torch.stack(log_q) + log_jacobian, _density_doubt(program, nodes, position)


def _density_doubt(program: LaneProgram, nodes: dict[str, Any], position: Tensor) -> str | None:
    if bool((position.amax(0) == position.amin(0)).any()):
        return "the guide is a point mass in some direction, so no weights can judge it"
    own = [
        name
        for name, node in nodes.items()
        if name not in program.latent and not node["infer"].get("is_auxiliary")
    ]
    if own:
        return f"the guide has random sites of its own ({', '.join(own)}), so its density is not known"
    return None
