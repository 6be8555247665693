"""Data files and data functions as arguments of a model."""

import csv
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from bayestie._cli.loading import guarded, load_function, near_miss
from bayestie._errors import DataError, KeywordError, OptionError

_MISSING = {"", "na", "nan", "null"}


@dataclass(frozen=True)
class Inputs:
    """A model's keyword arguments, with the labels of its dimensions."""

    arguments: dict[str, Any]
    coords: dict[str, Any] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


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
    found = guarded(function, name)
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
    known = takes_any or all(name in parameters for name in [*swept, *given])
    if missing and known:  # a misspelt keyword is the news then, and the library names it
        near = [near_miss(name, unused) for name in missing]
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
