"""bayestie on a CUDA machine: right, and how fast. Everything in one call of under 8 minutes, one table.

Run: python -m benchmarks.gpu [--out out/benchmarks]

Contraception at 16 strengths. Same answers: posterior means of the engine nuts on the device and on the CPU,
in units of both Monte Carlo errors. Speed: leapfrogs per second of nuts at 64, 1,024 and 8,192 lanes, of
Pyro's NUTS on the same device (one chain, as Pyro runs them), and of NumPyro with all lanes vmapped, where
it is installed. Every part runs in a process of its own and is stopped when its share of the time is up.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import _tables
from benchmarks._judge import judge, largest_z
from benchmarks._runs import run_limited
from benchmarks._worker import Record
from benchmarks._workloads import WORKLOADS, load_arrays

TOTAL = 460.0  # seconds
LANES = (64, 1024, 8192)
HEAD = ("part", "lanes", "ticks/s", "leapfrogs/s", "seconds", "result")


def correctness(device: str, num: int, record: Record) -> None:
    """Means on the device against means on the CPU, seeds apart."""
    import bayestie as bt

    workload = WORKLOADS["W2"].shortened(num, False)
    found, seconds = [], []
    for seed, where in enumerate(("cpu", device)):
        begin = time.perf_counter()
        path: Any = bt.sweep(
            workload.function(),
            **workload.data(),
            over={"sigma": workload.strengths},
            engine="nuts",
            seed=seed,
            device=where,
            keep=("posterior",),
        )
        seconds.append(time.perf_counter() - begin)
        draws = [
            np.concatenate([np.asarray(x).reshape(*x.shape[:2], -1) for x in one], -1)
            for one in zip(*(np.asarray(path.posterior[n]) for n in workload.quantities), strict=True)
        ]
        found.append(np.stack([judge(x)[1] for x in draws]))
    z = largest_z(*found)
    said = f"largest |z| {z:.1f} over {found[0][:, 0].size} means: {'same' if z < 4 else 'NOT THE SAME'}"
    record.update(seconds=seconds[1], result=f"{said}; CPU {seconds[0]:.1f} s")


def nuts(device: str, lanes: int, num: int, record: Record) -> None:
    """Ticks (one leapfrog in every lane still going) and leapfrogs per second, warmup included."""
    import torch

    import bayestie as bt
    from bayestie._engines import _lanes

    done = {"ticks": 0, "leapfrogs": 0, "seconds": 0.0}
    run = _lanes.Lanes.run

    def measured(self: Any, *arguments: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        result = run(self, *arguments, **keywords)
        if device == "cuda":
            torch.cuda.synchronize()
        done["ticks"] += self.ticks
        done["leapfrogs"] += self.leapfrogs
        done["seconds"] += time.perf_counter() - begin
        return result

    _lanes.Lanes.run = measured
    workload = WORKLOADS["W2"].shortened(num, False)
    begin = time.perf_counter()
    path: Any = bt.sweep(
        workload.function(),
        **workload.data(),
        over={"sigma": workload.strengths},
        engine="nuts",
        seed=0,
        device=device,
        num_chains=max(2, lanes // num),
        num_draws=25,
        target_ess=10,
        keep=("posterior",),
    )
    record.update(
        lanes=num * path.posterior.sizes["chain"],
        ticks=done["ticks"] / done["seconds"],
        leapfrogs=done["leapfrogs"] / done["seconds"],
        seconds=time.perf_counter() - begin,
        result=f"{done['leapfrogs'] / done['ticks']:.0f} lanes per tick on average",
    )


def pyro_nuts(device: str, _: int, num: int, record: Record) -> None:
    """One chain of Pyro's NUTS; every leapfrog runs the model once."""
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS

    from benchmarks._pyro import hand_written_model

    torch.set_default_dtype(torch.float64)
    torch.set_default_device(device)
    pyro.enable_validation(False)
    model, calls = hand_written_model("contraception"), [0]

    def counted(**keywords: Any) -> None:
        calls[0] += 1
        model(**keywords)

    data = {n: x if isinstance(x, int) else torch.as_tensor(x).to(device) for n, x in _arrays(num).items()}
    begin = time.perf_counter()
    each = 20 if device == "cuda" else 4  # a CPU only shows that it runs
    run = MCMC(NUTS(counted), num_samples=each, warmup_steps=each, disable_progbar=True)
    run.run(**data, sigma=1.0, centred=0.0)
    seconds = time.perf_counter() - begin
    rate = calls[0] / seconds
    record.update(lanes=1, ticks=rate, leapfrogs=rate, seconds=seconds, result="one chain")


def numpyro_nuts(device: str, lanes: int, num: int, record: Record) -> None:
    """All lanes of NumPyro's NUTS in one program, after compilation; a lane that waits does no work."""
    try:
        import jax  # pyright: ignore[reportMissingImports]

        found = {"cuda": "gpu"}.get(device, device)
        jax.config.update("jax_platforms", "cuda,cpu" if device == "cuda" else "cpu")
        if jax.default_backend() != found:
            raise RuntimeError(f"its device is {jax.default_backend()}")
    except (ImportError, RuntimeError) as error:
        record.update(result=f"not run: {error}"[:120])
        return
    from benchmarks._numpyro import BLOCK, NumPyroVmap

    workload = WORKLOADS["W2"].shortened(num, False)
    with tempfile.TemporaryDirectory() as folder:
        workload.save_arrays(Path(folder) / "data.npz")
        contender = NumPyroVmap(workload, Path(folder) / "data.npz", 0)
    sigma = np.repeat(workload.strengths, max(1, lanes // num))
    centred = (sigma > 1.0).astype(float)
    keys = jax.random.split(jax.random.PRNGKey(0), len(sigma))
    state = contender.start(keys, sigma, centred, 100)
    jax.block_until_ready(contender.block(state, sigma, centred))
    begin = time.perf_counter()
    state, _ = jax.block_until_ready(contender.block(state, sigma, centred))
    seconds = time.perf_counter() - begin
    # The state holds the last trajectory's length only: its mean over many lanes stands for the block's.
    leapfrogs = float(np.mean(np.asarray(state.num_steps))) * BLOCK * len(sigma)
    record.update(lanes=len(sigma), leapfrogs=leapfrogs / seconds, seconds=seconds, result=f"{BLOCK} draws")


def _arrays(num: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        WORKLOADS["W2"].shortened(num, False).save_arrays(Path(folder) / "data.npz")
        return load_arrays(Path(folder) / "data.npz")


PARTS: dict[str, Callable[..., None]] = {
    "bayestie nuts": nuts,
    "Pyro NUTS": pyro_nuts,
    "NumPyro vmapped": numpyro_nuts,
}
SAME = "same as CPU"


def _row(found: dict[str, Any]) -> list[str]:
    cells = [found["part"], f"{found['lanes']:,}" if "lanes" in found else ""]
    cells += [f"{found[name]:,.0f}" if name in found else "" for name in ("ticks", "leapfrogs")]
    cells.append(f"{found['seconds']:.1f}" if "seconds" in found else "")
    return [*cells, found.get("result", "") or found["error"] or "stopped: out of time"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts, print the table, write gpu.json and gpu.md. Exit status 2 without a CUDA device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("out") / "benchmarks")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, two strengths: does it run?")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.task:
        task = json.loads(given.task.read_text())
        record = Record(Path(task["record"]))
        if task["part"] == SAME:
            correctness(task["device"], task["num"], record)
        else:
            PARTS[task["part"]](task["device"], task["lanes"], task["num"], record)
        return 0
    import torch

    device, num, lanes = "cuda", 16, LANES
    if given.smoke:
        device, num, lanes = "cpu", 2, (8,)
    elif not torch.cuda.is_available():
        sys.stderr.write("No CUDA device here: run this on a machine that has one, or --smoke.\n")
        return 2
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    tasks = [(SAME, 0)] + [("bayestie nuts", n) for n in lanes]
    tasks += [("Pyro NUTS", 1)]
    if not given.smoke:  # on a CPU its lanes take minutes
        tasks += [("NumPyro vmapped", n) for n in lanes[:2]]
    console = Console(width=None if sys.stdout.isatty() else 140)
    deadline, results = time.monotonic() + TOTAL, []
    for i, (part, count) in enumerate(tasks):
        # What a part leaves over, those after it share; the first ones may take up to twice their share.
        left = deadline - time.monotonic()
        share = min(left, 2.0 * left / (len(tasks) - i))
        with tempfile.TemporaryDirectory() as folder:
            file, record = Path(folder) / "task.json", Path(folder) / "record.json"
            task = {"part": part, "device": device, "lanes": count, "num": num, "record": str(record)}
            file.write_text(json.dumps(task))
            # JAX otherwise takes most of the card's memory at its start.
            environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            _, error = run_limited("benchmarks.gpu", f"--task={file}", share, environment)
            found = json.loads(record.read_text()) if record.exists() else {"lanes": count}
        results.append({"part": part, "error": error, **found})
        console.print(f"{part} {count or ''}: {_row(results[-1])[-1]}")
    rows = [_row(found) for found in results]
    console.print(_tables.screen(f"nuts on {name}", rows, HEAD))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.md").write_text(_tables.markdown(f"nuts on {name}", rows, HEAD))
    (given.out / "gpu.json").write_text(json.dumps({"device": name, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
