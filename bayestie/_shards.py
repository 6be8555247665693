"""A sweep cut into shards of neighbouring strengths, each a task of an executor, and put together again."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from typing import Any

import numpy as np
import xarray as xr

# How many tasks a sweep is cut into, whatever the number of workers: the same shards, the same draws.
SHARDS = 8


def run_in_shards(
    executor: Executor,
    run: Callable[..., xr.DataTree],
    over: Mapping[str, np.ndarray],
    seed: int,
    progress: Callable[[dict[str, Any]], None],
) -> tuple[xr.DataTree, bool]:
    """``run(over=..., seed=...)`` for every shard, in order along the longest swept keyword.

    An executor may run a shard again after a worker died: the same shard and seed give the same draws.

    Returns:
        The shards as one tree, and whether all of them are in it: an interrupt leaves those out that were
        not finished.

    Raises:
        KeyboardInterrupt: before any shard was finished.
    """
    begin = time.perf_counter()
    name = max(over, key=lambda key: len(over[key]))
    total = len(over[name])
    parts = np.array_split(np.arange(total), min(SHARDS, total))
    seeds = np.random.SeedSequence(seed).generate_state(len(parts), np.uint64) >> np.uint64(1)
    futures = [
        executor.submit(run, over={**_lists(over), name: over[name][part].tolist()}, seed=int(own))
        for part, own in zip(parts, seeds, strict=True)
    ]
    whole, points = True, total * int(np.prod([len(v) for key, v in over.items() if key != name]))
    trees: dict[int, xr.DataTree] = {}
    number = {id(future): i for i, future in enumerate(futures)}
    try:
        for future in as_completed(futures):
            i = number[id(future)]
            trees[i] = future.result()
            done = sum(len(parts[j]) for j in trees) * points // total
            progress({"stage": "shards", "strengths_done": done, "strengths_total": points})
    except KeyboardInterrupt:
        whole = False
        if not trees:
            raise
    finally:
        for future in futures:
            future.cancel()
    tree = joined([trees[i] for i in sorted(trees)], name)
    tree.attrs.update(seed=seed, shards=len(parts), seconds_total=round(time.perf_counter() - begin, 4))
    if not whole:
        tree.attrs["interrupted"] = 1
    return tree, whole


def _lists(over: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in over.items()}


def joined(trees: Sequence[xr.DataTree], along: str) -> xr.DataTree:
    """Trees of parts of a sweep as one, in order along a swept keyword.

    What shards say of one another's draws (group ``overlap``) is not known, and left out.
    """
    first = trees[0]
    whole = xr.DataTree(xr.Dataset(attrs=dict(first.attrs)))
    for group in first.children:
        parts = [tree[group].to_dataset() for tree in trees]
        if group == "overlap":
            continue
        if along in parts[0].dims:
            moving = [name for name, x in parts[0].data_vars.items() if along in x.dims]
            still = parts[0].drop_vars([along, *moving])
            kept = xr.concat([part[moving] for part in parts], along, coords="minimal", compat="override")
            parts[0] = kept.merge(still, compat="override").assign_attrs(parts[0].attrs)
        whole[group] = xr.DataTree(parts[0])
    whole.attrs["ties"] = _ties([json.loads(tree.attrs["ties"]) for tree in trees])
    return whole


def _ties(records: Sequence[dict[str, dict[str, Any]]]) -> str:
    """The records of the ties; a shard of one strength cannot tell whether sigma works elsewhere."""
    found = records[0]
    for name, record in found.items():
        record["sigma_elsewhere"] = any(other[name]["sigma_elsewhere"] for other in records)
    return json.dumps(found)
