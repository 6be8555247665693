"""Independent pieces of tensor work on the processor's cores, one thread each."""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_here = threading.local()
WORTH_A_THREAD = 200_000  # numbers: handing a job to another thread takes as long as some 50,000


def run_all(jobs: Sequence[Callable[[], Any]], on_error: Callable[[], None] | None = None) -> list[Any]:
    """Results of ``jobs`` in order, side by side where the caller may use several threads.

    A few long kernels share the cores better than one kernel split among them: threads meet once, not at the
    end of every operation. Gradients are off in the jobs. ``on_error`` is called where one fails or the wait
    is interrupted, before the others are waited for.
    """
    threads = torch.get_num_threads()
    if min(threads, len(jobs)) <= 1 or in_worker():
        return [_run(job) for job in jobs]
    with unsplit():
        futures = [_pool(threads).submit(_run, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            if on_error is not None:
                on_error()
            wait(futures)
            raise


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (P, D), ascending, and eigenvectors (P, D, D) of symmetric matrices (P, D, D).

    A thread to every share of the matrices: LAPACK that is split over threads meets at every Householder
    reflection, which beside other work took hundreds of times as long.
    """
    if matrices.device.type != "cpu":
        return torch.linalg.eigh(matrices)
    share = max(1, -(-len(matrices) // torch.get_num_threads()))
    with unsplit():
        if len(matrices) <= share or in_worker():
            return torch.linalg.eigh(matrices)
    found = run_all([partial(torch.linalg.eigh, part) for part in matrices.split(share)])
    values, vectors = zip(*found, strict=True)
    return torch.cat(values), torch.cat(vectors)


def solve(matrices: Tensor, right: Tensor) -> Tensor:
    """x (P, D, n) with matrices (P, D, D) times x = right (P, D, n).

    By numpy's LAPACK: torch factorises a batch on several threads at once, which MKL does not bear beyond
    some 150 rows (an error, wrong numbers or no end: pytorch/pytorch#142815).
    """
    if matrices.device.type != "cpu":
        return torch.linalg.solve(matrices, right)
    return torch.from_numpy(np.linalg.solve(matrices.detach().numpy(), right.detach().numpy()))


@contextlib.contextmanager
def unsplit() -> Iterator[None]:
    """Operations on one core each: many short ones lose more by being split than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_worker() -> bool:
    """Whether this is one of the threads of `run_all`."""
    return getattr(_here, "is_worker", False)


def _run(job: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return job()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bayestie", initializer=_start_worker)


# A forked process has no threads: it makes its own pool when it needs one.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _start_worker() -> None:
    _here.is_worker = True
    torch.set_num_threads(1)


_KEPT = 1 << 22  # numbers; more than this is given back


def scratch(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised memory of this thread, the same at every call: fresh pages cost more than arithmetic."""
    size = math.prod(shape)
    if like.device.type != "cpu" or size > _KEPT:
        return like.new_empty(shape)
    kept: dict[Any, Tensor] = _here.__dict__.setdefault("kept", {})
    found = kept.get((name, like.dtype))
    if found is None or len(found) < size:
        found = kept[name, like.dtype] = like.new_empty(size)
    return found[:size].view(shape)
