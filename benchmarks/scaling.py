"""How bayestie's time and memory grow, and what a sweep costs beside separate fits.

Run: python -m benchmarks.scaling [--smoke] [--limit 600] [--out out/benchmarks]

Curves: strengths (Contraception), copies (a Poisson chain), rows (Contraception, its women drawn again).
Every point runs in a fresh process: a cold call, its peak memory above the imports, a warm call.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import _tables
from benchmarks._runs import run_limited
from benchmarks._worker import Record, forget_peak, memory_mib

CURVES: dict[str, tuple[int, ...]] = {
    "strengths": (1, 2, 4, 8, 16, 32, 64),
    "copies": (100, 1_000, 10_000, 100_000, 1_000_000),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
}
SMOKE: dict[str, tuple[int, ...]] = {"strengths": (1, 2), "copies": (20,), "rows": (500,)}
RATIO_ENGINES = ("laplace", "auto", "nuts")
HEAD = ("curve", "size", "cold s", "warm s", "peak MiB", "engines", "certified")
RATIO_HEAD = (
    *("engine", "strengths", "sum of separate fits s", "sweep s", "ratio"),
    *("of strengths not seen before s", "ratio"),
)


def sweep_arguments(curve: str, size: int) -> tuple[Any, dict[str, Any]]:
    """Model and keywords of a point: of the other two sizes, the moderate ones."""
    import torch

    import bayestie as bt
    from models import contraception, poisson_chain

    if curve == "copies":
        over = {"sigma": bt.strengths(0.05, 0.2, 2)}
        return poisson_chain.poisson_chain, {**poisson_chain.data(size), "over": over}
    data = contraception.data()
    num = size if curve == "strengths" else 4
    over = {"sigma": bt.strengths(0.1, 30.0, num) if num > 1 else [1.0]}
    if curve == "rows":
        generator = torch.Generator().manual_seed(0)
        row = torch.randint(len(data["use"]), (size,), generator=generator)
        data |= {name: data[name][row] for name in ("use", "age", "urban", "district")}
        data["coords"] = {"district": data["coords"]["district"]}
    return contraception.contraception, {**data, "over": over}


def point(curve: str, size: int, record: Record) -> None:
    """A point of a curve, in this process."""
    import bayestie as bt

    model, keywords = sweep_arguments(curve, size)
    forget_peak()
    before = memory_mib()[0]
    for name in ("cold", "warm"):
        begin = time.perf_counter()
        said: Any = bt.sweep(model, **keywords, seed=0, keep=("posterior",))["sweep"]
        record.update(**{name: time.perf_counter() - begin})
        if name == "cold":
            record.update(
                peak_mib=memory_mib()[1] - before,
                engines=sorted({str(x) for x in said["engine"].values}),
                certified=f"{int(said['certified'].sum())} of {said['certified'].size}",
            )


def ratio(engine: str, num: int, record: Record) -> None:
    """A warm sweep of `num` strengths against the sum of as many warm fits, on Contraception.

    Both are run twice in one process, and the second times are compared. What is remembered of a model serves
    the sweep there and not the fits, each of which has another strength: so the sweep is timed at strengths
    that it has not seen, too.
    """
    from bayestie import fit, strengths, sweep
    from models.contraception import contraception, data

    grid, keywords = strengths(0.1, 30.0, num), {**data(), "engine": engine, "keep": ("posterior",)}

    def seconds(call: Any, **more: Any) -> float:
        begin = time.perf_counter()
        call(contraception, **keywords, **more)
        return time.perf_counter() - begin

    seconds(sweep, over={"sigma": strengths(0.11, 29.0, num)})
    unseen = seconds(sweep, over={"sigma": grid})
    again = seconds(sweep, over={"sigma": grid})
    record.update(sweep=again, unseen=unseen)
    separate = [sum(seconds(fit, sigma=sigma) for sigma in grid) for _ in range(2)][1]
    record.update(separate=separate, ratio=again / separate, ratio_unseen=unseen / separate)


def import_seconds(statement: str, after: str, times: int = 5) -> float:
    """Least process time of a statement after another, in fresh processes."""
    code = f"import time\n{after}\nt = time.process_time()\n{statement}\nprint(time.process_time() - t)"
    run = [sys.executable, "-c", code]
    return min(
        float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(times)
    )


def measured(task: dict[str, Any], limit: float) -> dict[str, Any]:
    """A task's record from a process of its own, with `stopped` and `error`."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        spec = Path(folder) / "spec.json"
        spec.write_text(json.dumps({**task, "record": str(record)}))
        stopped, error = run_limited("benchmarks.scaling", f"--task={spec}", limit, {})
        found = json.loads(record.read_text()) if record.exists() else {}
        return {**task, **found, "stopped": stopped, "error": error}


def _cell(found: dict[str, Any], name: str, limit: float) -> str:
    if name in found:
        return f"{found[name]:.3g}"
    return f"> {limit:.0f}" if found["stopped"] else found["error"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write scaling.json and scaling.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--curve", nargs="*", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per point (default: 600)")
    parser.add_argument("--smoke", action="store_true", help="the least sizes: does it run?")
    parser.add_argument("--out", type=Path, default=Path("out") / "benchmarks")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)  # one measurement, of this process
    given = parser.parse_args(argv)
    if given.task:
        task = json.loads(given.task.read_text())
        record = Record(Path(task["record"]))
        if task["kind"] == "ratio":
            ratio(task["engine"], task["num"], record)
        else:
            point(task["curve"], task["size"], record)
        return 0

    console, limit = Console(width=None if sys.stdout.isatty() else 160), given.limit
    given.out.mkdir(parents=True, exist_ok=True)
    times = 1 if given.smoke else 5
    imports = {
        "import pyro": import_seconds("import pyro", "", times),
        "import bayestie, over pyro": import_seconds("import bayestie", "import pyro", times),
        "its sweep and ties, over pyro": import_seconds(
            "import bayestie; bayestie.sweep, bayestie.tied, bayestie.Tie", "import pyro", times
        ),
    }
    tables: list[tuple[str, tuple[str, ...], list[list[str]]]] = [
        ("Imports, s of process time", ("what", "s"), [[k, f"{v:.3f}"] for k, v in imports.items()])
    ]
    num, engines = (2, RATIO_ENGINES[:1]) if given.smoke else (16, RATIO_ENGINES)
    ratios = [measured({"kind": "ratio", "engine": engine, "num": num}, limit) for engine in engines]
    rows = [
        [r["engine"], str(num)]
        + [_cell(r, name, limit) for name in ("separate", "sweep", "ratio", "unseen", "ratio_unseen")]
        for r in ratios
    ]
    tables.append(("A sweep beside separate fits, warm", RATIO_HEAD, rows))
    points = []
    for curve in given.curve:
        for size in (SMOKE if given.smoke else CURVES)[curve]:
            found = measured({"kind": "point", "curve": curve, "size": size}, limit)
            points.append(found)
            console.print(f"{curve} {size}: {_cell(found, 'warm', limit)} s warm")
            if found["stopped"] or found["error"]:
                break  # the next is larger
    rows = [
        [r["curve"], f"{r['size']:,}", *(_cell(r, name, limit) for name in ("cold", "warm", "peak_mib")),
         ", ".join(r.get("engines", [])), r.get("certified", "")]
        for r in points
    ]  # fmt: skip
    tables.append(("Growth", HEAD, rows))
    for title, head, body in tables:
        console.print(_tables.screen(title, body, head))
    text = "\n".join(_tables.markdown(title, body, head) for title, head, body in tables)
    (given.out / "scaling.md").write_text("# Scaling\n\n" + text)
    (given.out / "scaling.json").write_text(
        json.dumps({"imports": imports, "ratios": ratios, "points": points}, indent=1)
    )
    console.print(f"Results: {given.out / 'scaling.json'}, {given.out / 'scaling.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
