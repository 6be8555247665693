"""Places that results and reports are written to."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from bayestie._errors import OutputError

NETCDF_SUFFIXES, ZARR_SUFFIXES = (".nc", ".nc4", ".netcdf"), (".zarr",)
RESULT_SUFFIXES = NETCDF_SUFFIXES + ZARR_SUFFIXES


def check_place(path: Path, suffixes: Sequence[str]) -> None:
    """Before the work, not after it: a place that cannot be written would cost the whole run.

    Raises:
        OutputError: another suffix, or a folder that is missing or cannot be written.
    """
    check_suffix(path, suffixes)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(
            str(path),
            found=f"{type(error).__name__}: {error.strerror or error}",
            expected="a place that can be written",
            fix="Check that the folder exists, that you may write there and that the disk has room.",
        ) from error


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """A name says by its end what kind of file it is.

    Raises:
        OutputError: it ends in none of the suffixes.
    """
    if path.suffix.lower() not in suffixes:
        raise OutputError(
            str(path),
            found=f"the suffix {path.suffix!r}",
            expected=f"one of {', '.join(suffixes)}",
            fix=f"Name it, for example, {path.stem or 'results'}{suffixes[0]}.",
        )
