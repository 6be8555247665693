"""Before the clock runs: the fewest draws, and the better parametrisation, at every strength."""

import time
from collections.abc import Callable

import numpy as np

from benchmarks._contender import Contender, Setting
from benchmarks._judge import judge

DRAWS = (250, 350, 500, 650, 800, 1000, 1300, 1600, 2000, 3000, 4000, 6000, 8000)
WARMUP = 300
Found = Callable[[list[Setting], list[bool]], None]


def search(contender: Contender, given: list[Setting] | None, most: int, found: Found) -> None:
    """Find settings that pass the judge.

    Args:
        contender: what is run.
        given: settings found for a related contender: their parametrisations are taken over where all
            strengths run together, since lanes cannot be tried one by one.
        most: draws per chain not to go beyond.
        found: told of the settings so far and of whether each passes, so that a search cut short still
            leaves something.
    """
    strengths = contender.workload.strengths
    schedule = [n for n in DRAWS if n <= most] or [most]
    if contender.together:
        parametrisations = [s.centred for s in given] if given else [0] * len(strengths)
        if contender.parametrisations == (0,):
            parametrisations = [0] * len(strengths)
        _all_at_once(contender, strengths, parametrisations, schedule, found)
        return
    # Compiled before anything is compared: else the first parametrisation tried would always be the slower.
    contender.run(strengths[:1], [Setting(0, 50, WARMUP)], _silent)
    settings, passed = [], []
    for sigma in strengths:
        setting, ok = _one_strength(contender, sigma, schedule, settings[-1] if settings else None)
        settings.append(setting)
        passed.append(ok)
        found(settings, passed)


def _all_at_once(
    contender: Contender,
    strengths: list[float],
    parametrisations: list[int],
    schedule: list[int],
    found: Found,
) -> None:
    for draws in schedule:
        settings = [Setting(centred, draws, WARMUP) for centred in parametrisations]
        passed = [judge(x)[0].passed for x in contender.run(strengths, settings, _silent)]
        found(settings, passed)
        if all(passed):
            return


def _one_strength(
    contender: Contender, sigma: float, schedule: list[int], before: Setting | None
) -> tuple[Setting, bool]:
    """The setting that passes in the least time; what served the strength before is tried first."""
    order = sorted(contender.parametrisations, key=lambda c: before is not None and c != before.centred)
    start = schedule.index(before.draws) if before else 0
    best: tuple[float, Setting] | None = None
    for centred in order:
        found = _fewest(contender, sigma, centred, schedule, start, best[0] if best else float("inf"))
        if found is not None:
            best = found
    return (best[1], True) if best else (Setting(order[0], schedule[-1], WARMUP), False)


def _fewest(
    contender: Contender, sigma: float, centred: int, schedule: list[int], start: int, limit: float
) -> tuple[float, Setting] | None:
    """Seconds and setting of the fewest draws that pass, None where they would take longer than `limit`."""

    def attempt(index: int) -> tuple[float, Setting, bool]:
        setting = Setting(centred, schedule[index], WARMUP)
        begin = time.perf_counter()
        draws = contender.run([sigma], [setting], _silent)[0]
        return time.perf_counter() - begin, setting, judge(np.asarray(draws))[0].passed

    best = None
    index = start
    while 0 <= index < len(schedule):
        seconds, setting, passed = attempt(index)
        if passed:
            best = (seconds, setting) if seconds < limit else best
            if index > start:
                break  # the step below has failed
            index -= 1
        else:
            if index < start or seconds > limit:
                break
            index += 1
    return best


def _silent(_: int) -> None:
    pass
