"""Results trees on disk: written whole or not at all, read back with nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from bayestie._errors import OutputError, ResultsFileError
from bayestie._places import RESULT_SUFFIXES, ZARR_SUFFIXES, check_suffix

SCHEMA_VERSION = 1
SCHEMA = "bayestie_schema"

_MANIFEST = "bayestie_manifest"
# Times and durations are labels like any other and must come back as they went.
_DECODING: dict[str, Any] = {
    "decode_times": xr.coders.CFDatetimeCoder(time_unit="us"),
    "decode_timedelta": xr.coders.CFTimedeltaCoder(),
}


def save(tree: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a results tree to NetCDF (``.nc``) or Zarr (``.zarr``), whole or not at all.

    The file is written beside its place and moved there when complete. A checksum per array goes
    along, since a Zarr store with lost chunks would otherwise read back as zeros.

    Args:
        tree: what ``fit``, ``sweep`` or ``select`` returned.
        path: where to; an older result there is replaced.

    Returns:
        The path.

    Raises:
        OutputError: the suffix is unknown or the place cannot be written.
    """
    path = Path(path)
    check_suffix(path, RESULT_SUFFIXES)
    if path.is_dir() and not _is_our_store(path):
        raise OutputError(
            str(path),
            found="a folder that is not a bayestie result",
            expected="a new name, or an older result",
            fix="Choose another name; a folder with other content is never replaced.",
        )
    tree = tree.copy()
    # A string: HDF5 limits attributes to 64 KiB unless they are variable-length strings, which JSON is.
    tree.attrs = {**tree.attrs, SCHEMA: SCHEMA_VERSION, _MANIFEST: json.dumps(_manifest(tree))}
    with atomic_place(path) as temporary:
        if path.suffix.lower() in ZARR_SUFFIXES:
            tree.to_zarr(temporary, mode="w-", consolidated=False, encoding=_encoding(tree, {}))
        else:
            # gzip at its lowest level after a byte shuffle: draws shrink by a tenth to a fifth
            # (their exponents) and whatever repeats nearly vanishes; higher levels gain nothing.
            compression = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
            tree.to_netcdf(temporary, engine="h5netcdf", encoding=_encoding(tree, compression))
    return path


def load(path: str | os.PathLike[str]) -> xr.DataTree:
    """Read a results tree back into memory and check that nothing of it is missing.

    Args:
        path: a ``.nc`` file or ``.zarr`` folder that ``save`` or ``--out`` wrote.

    Returns:
        The tree as it was saved: same values, labels, types and attributes.

    Raises:
        ResultsFileError: the file is missing, damaged, cut short, not ours or from another version.
    """
    path = Path(path)
    if not path.exists():
        raise ResultsFileError(
            str(path),
            found="no such file",
            expected="a result written by bayestie",
            fix="Check the name and folder.",
        )
    engine = "zarr" if path.is_dir() else "h5netcdf"
    try:
        with xr.open_datatree(path, engine=engine, **_DECODING, **_zarr_options(engine)) as opened:
            tree = opened.load().copy()
    except Exception as error:
        # Every layer below (xarray, h5py, zarr, zlib) reports damage with types of its own.
        raise ResultsFileError(
            str(path),
            found=f"a file that cannot be read ({type(error).__name__}: {error})",
            expected="a complete NetCDF or Zarr result written by bayestie",
            fix="If the run was cut off or the copy broke, run it or copy it again.",
        ) from error
    return _verified(tree, path)


def _is_our_store(path: Path) -> bool:
    metadata = path / "zarr.json"
    return metadata.is_file() and SCHEMA in metadata.read_text(errors="replace")


def _zarr_options(engine: str) -> dict[str, Any]:
    return {"consolidated": False} if engine == "zarr" else {}


def _arrays(tree: xr.DataTree) -> Iterator[tuple[str, str, xr.Variable]]:
    for node in tree.subtree:
        for name, variable in node.to_dataset(inherit=False).variables.items():
            yield node.path, str(name), variable


def _checksum(values: np.ndarray) -> int:
    if values.dtype.kind == "U":
        return zlib.crc32("\0".join(values.ravel().tolist()).encode())
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _manifest(tree: xr.DataTree) -> dict[str, list[Any]]:
    return {
        f"{path.rstrip('/')}/{name}": [variable.dtype.str, _checksum(variable.values)]
        for path, name, variable in _arrays(tree)
    }


def _encoding(tree: xr.DataTree, compression: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    encoding: dict[str, dict[str, dict[str, Any]]] = {}
    for path, name, variable in _arrays(tree):
        options: dict[str, Any] = {}
        if variable.dtype.kind == "f":
            # Without this NaN becomes a fill value and float coordinates gain an attribute.
            options["_FillValue"] = None
        if variable.dtype.kind in "fiu" and variable.size > 1:
            options.update(compression)
        encoding.setdefault(path, {})[name] = options
    return encoding


@contextlib.contextmanager
def atomic_place(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` that takes its place when the block ends well."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        fresh = folder / path.name
        yield fresh
        if path.is_dir():
            # A folder cannot be replaced in one step: the old one moves aside, so one is always there.
            path.rename(folder / "old")
        fresh.replace(path)
    except OSError as error:
        if (folder / "old").exists() and not path.exists():
            (folder / "old").rename(path)
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        str(path),
        found=f"{type(error).__name__}: {error.strerror or error}",
        expected="a place that can be written",
        fix="Check that the folder exists, that you may write there and that the disk has room.",
    )


def _verified(tree: xr.DataTree, path: Path) -> xr.DataTree:
    attrs = {
        name: value.item() if isinstance(value, np.generic) else value for name, value in tree.attrs.items()
    }
    if SCHEMA not in attrs or _MANIFEST not in attrs:
        raise ResultsFileError(
            str(path),
            found="a file without bayestie's marks",
            expected="a result written by bayestie's save or --out",
            fix="ArviZ files of other tools open with xarray.open_datatree.",
        )
    if attrs[SCHEMA] != SCHEMA_VERSION:
        raise ResultsFileError(
            str(path),
            found=f"schema version {attrs[SCHEMA]}",
            expected=f"version {SCHEMA_VERSION}",
            fix="Read it with the bayestie that wrote it, or run the sweep again.",
        )
    expected = json.loads(attrs.pop(_MANIFEST))
    datasets = {node.path: node.to_dataset(inherit=False) for node in tree.subtree}
    seen = set()
    for group, name, variable in _arrays(tree):
        key = f"{group.rstrip('/')}/{name}"
        seen.add(key)
        if key not in expected:
            continue
        dtype, checksum = expected[key]
        if variable.dtype.str != dtype:
            variable = variable.astype(dtype)
            datasets[group] = datasets[group].assign({name: variable})
        if _checksum(variable.values) != checksum:
            raise _damaged(path, f"{key} with other values than were written")
        datasets[group][name].encoding.clear()
    if missing := sorted(set(expected) - seen):
        raise _damaged(path, f"no {', '.join(missing[:3])}")
    datasets["/"].attrs = attrs
    return xr.DataTree.from_dict(datasets)


def _damaged(path: Path, found: str) -> ResultsFileError:
    return ResultsFileError(
        str(path),
        found=found,
        expected="every array as it was written",
        fix="The file was damaged or changed since: copy it again or run the sweep again.",
    )
