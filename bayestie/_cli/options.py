"""Values written on the command line: strengths, points, keywords, names of dimensions."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import bayestie as bt
from bayestie._errors import OptionError


def parse_over(options: Sequence[str], *, hard: bool, free: bool) -> dict[str, Any]:
    """`sigma=0.1:30:16` (log-spaced) or `sigma=0,1,5,inf`, with the two ends on request."""
    flag, over = "--over", {}
    for option, name, values in _by_keyword(options, flag, "sigma=0.1:30:16 or sigma=0,1,5,inf"):
        if ":" in values:
            low, high, num = _range(flag, option, values, "low:high:number, as in 0.1:30:16")
            over[name] = bt.strengths(low, high, num, hard=hard, free=free)
        else:
            points = set(_list(flag, option, values))
            points |= ({0.0} if hard else set()) | ({math.inf} if free else set())
            over[name] = sorted(points)
    return over


def parse_schedule(options: Sequence[str]) -> dict[str, list[float]]:
    """`sigma=30:0.1:12` (log-spaced) or `sigma=inf,10,1`, in the order they are passed through."""
    flag, schedule = "--schedule", {}
    for option, name, values in _by_keyword(options, flag, "sigma=30:0.1:12 or sigma=inf,10,1"):
        if ":" in values:
            first, last, num = _range(flag, option, values, "first:last:number, as in 30:0.1:12")
            rising = bt.strengths(min(first, last), max(first, last), num)
            schedule[name] = rising if first < last else rising[::-1]
        else:
            schedule[name] = _list(flag, option, values)
    return schedule


def parse_points(options: Sequence[str]) -> list[dict[str, float]]:
    """`sigma=5`, or `sigma=5,tau=1` for a grid over two keywords, to points of a sweep."""
    points = []
    for option in options:
        pairs = (_split(part, "--at", "sigma=5") for part in option.split(","))
        points.append({name: _number("--at", option, value) for name, value in pairs})
    return points


def _by_keyword(options: Sequence[str], flag: str, example: str) -> Iterator[tuple[str, str, str]]:
    """Each option, the keyword it names and the values it gives, every keyword once."""
    seen = set()
    for option in options:
        name, values = _split(option, flag, example)
        if name in seen:
            raise OptionError(
                f"{flag} {option}",
                found=f"'{name}' twice",
                expected="each keyword once",
                fix="Join the two lists.",
            )
        seen.add(name)
        yield option, name, values


def _list(flag: str, option: str, values: str) -> list[float]:
    return [_number(flag, option, part) for part in values.split(",")]


def _range(flag: str, option: str, values: str, expected: str) -> tuple[float, float, int]:
    parts = values.split(":")
    if len(parts) != 3 or not parts[2].strip().isdecimal():
        raise OptionError(
            f"{flag} {option}",
            found=f"the range '{values}'",
            expected=expected,
            fix="The number of strengths is a whole number; the points are log-spaced.",
        )
    return _number(flag, option, parts[0]), _number(flag, option, parts[1]), int(parts[2])


def _number(flag: str, option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(
            f"{flag} {option}",
            found=f"'{text}'",
            expected="a number or inf",
            fix="Write numbers like 0.1 or 1e-3.",
        ) from error


def parse_set(options: Sequence[str]) -> dict[str, Any]:
    """`name=value` to keywords: numbers, true, false and none are read as such, the rest is text."""
    return {name: _value(text) for name, text in (_split(o, "--set", "level_sd=5") for o in options)}


def parse_dims(options: Sequence[str]) -> dict[str, list[str]]:
    """`theta=school` or `theta=row,column` to the names of a site's dimensions."""
    pairs = (_split(option, "--dims", "theta=school") for option in options)
    return {name: [part.strip() for part in text.split(",")] for name, text in pairs}


def _split(option: str, flag: str, example: str) -> tuple[str, str]:
    name, separator, value = option.partition("=")
    if not (name.strip() and separator and value.strip()):
        raise OptionError(
            f"{flag} {option}", found=f"'{option}'", expected="name=value", fix=f"As in {flag} {example}."
        )
    return name.strip(), value.strip()


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
