"""One contender on one workload in a process of its own: `python -m benchmarks._worker SPEC.json`.

The specification is written by `_runs`; what is found goes to the file it names, after every step, so that
a process stopped at its limit leaves how far it got.
"""

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._contender import Contender, Setting
from benchmarks._workloads import WORKLOADS

CONTENDERS = {
    "bayestie": "_bayestie.Sweep",
    "bayestie nuts": "_bayestie.SweepNUTS",
    "numpyro": "_numpyro.NumPyroLoop",
    "numpyro vmap": "_numpyro.NumPyroVmap",
    "nutpie": "_nutpie.NutpieLoop",
    "pyro": "_pyro.PyroNUTS",
}


class Record:
    """A JSON file that is whole at every moment."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = {}

    def update(self, **values: Any) -> None:
        self.values.update(values)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.values))
        fresh.replace(self.path)


def memory_mib() -> tuple[float, float]:
    """Memory that this process holds, and the most it has held since `forget_peak`, MiB.

    Not getrusage: its peak starts at that of the process that started this one.
    """
    held = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            held[name] = int(value.split()[0]) / 1024
    return held["VmRSS"], held["VmHWM"]


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def load_contender(name: str, *arguments: Any) -> Contender:
    module, cls = CONTENDERS[name].split(".")
    return getattr(import_module(f"benchmarks.{module}"), cls)(*arguments)


def timed(contender: Contender, settings: list[Setting], started: float, record: Record) -> None:
    """Cold call, whole process until then, memory, verdict; then the warm call."""
    from time import perf_counter

    strengths = contender.workload.strengths
    forget_peak()
    before = memory_mib()[0]
    begin = perf_counter()

    def progress(done: int) -> None:
        record.update(done=done, elapsed=perf_counter() - begin)

    record.update(stage="cold", done=0)
    draws = contender.run(strengths, settings, progress)
    cold = perf_counter() - begin
    # The monotonic clock is the machine's: the parent read it when it started this process.
    record.update(cold=cold, whole=time.monotonic() - started, peak_mib=memory_mib()[1] - before)

    from benchmarks._judge import judge  # brings scipy, whose memory and import are not the contender's

    judged = [judge(x) for x in draws]
    record.update(
        verdicts=[verdict.as_dict() for verdict, _ in judged], claims=contender.claims(), stage="judged"
    )
    np.save(record.path.with_suffix(".npy"), np.stack([means for _, means in judged]))
    del draws
    record.update(stage="warm", done=0)
    begin = perf_counter()
    contender.run(strengths, settings, progress)
    record.update(warm=perf_counter() - begin, stage="done")


def main() -> None:
    """Run what the specification asks for."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    workload = WORKLOADS[spec["workload"]].shortened(spec["num"], spec["smoke"])
    record = Record(Path(spec["record"]))
    try:
        contender = load_contender(spec["contender"], workload, Path(spec["arrays"]), spec["seed"])
    except ImportError as error:
        record.update(missing=str(error))
        return
    given = [Setting(**one) for one in spec["settings"]] if spec["settings"] else None
    if spec["mode"] == "search":
        from benchmarks._search import search

        def found(settings: list[Setting], passed: list[bool]) -> None:
            record.update(settings=[one.as_dict() for one in settings], passed=passed)

        search(contender, given, spec["most"], found)
        record.update(stage="done")
    else:
        assert given is not None
        timed(contender, given, spec["started"], record)


if __name__ == "__main__":
    main()
