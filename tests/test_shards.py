"""Sweeps on an executor: the shards' draws wherever they run, and when a worker dies."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import xarray as xr

import bayestie as bt
from bayestie._errors import ModelError, OptionError
from models import eight_schools

ROOT = Path(__file__).parent.parent
GRID = bt.strengths(0.1, 30.0, 9, hard=True)
OPTIONS: dict[str, Any] = {"seed": 3, "num_draws": 20}


def unhurried(effect, stderr, *, sigma):
    """Eight schools, long enough to be interrupted."""
    time.sleep(0.02)
    theta = bt.tied("theta", bt.Tie.exchangeable(8), sigma, dist.Normal(0.0, 5.0))
    with pyro.plate("school", 8):
        pyro.sample("y", dist.Normal(theta, stderr), obs=effect)


def refuses(effect, stderr, *, sigma):
    pyro.sample("y", dist.Normal(effect[0], stderr[0]), obs=effect[1])


def data():
    return {name: x for name, x in eight_schools.data().items() if name in ("effect", "stderr")}


def here(model=unhurried, **options):
    with ThreadPoolExecutor(1) as executor:
        return bt.sweep(model, **data(), over={"sigma": GRID}, executor=executor, **(OPTIONS | options))


@pytest.fixture(scope="module")
def local():
    return here()


def assert_same_draws(found, expected):
    for group in ("posterior", "sweep", "sample_stats", "laplace_draws", "loo"):
        for name, x in expected[group].data_vars.items():
            if name != "seconds":
                xr.testing.assert_identical(found[group][name], x)


def test_shards_make_the_whole_sweep(local):
    plain = bt.sweep(unhurried, **data(), over={"sigma": GRID}, **OPTIONS)
    assert local.attrs["shards"] == 8 and local.attrs["seed"] == 3 and "14.71" in local.attrs["call"]
    assert set(plain.children) - set(local.children) == {"overlap"}
    for group in local.children:
        assert {n: x.dims for n, x in local[group].data_vars.items()} == {
            n: x.dims for n, x in plain[group].data_vars.items()
        }
    np.testing.assert_array_equal(local.sweep.sigma, GRID)
    np.testing.assert_allclose(local.sweep.log_evidence, plain.sweep.log_evidence, atol=1e-10)  # exact
    assert json.loads(local.attrs["ties"]) == json.loads(plain.attrs["ties"])
    # Shards have noise of their own: no two strengths share their draws.
    z = local.posterior["theta_z"].values.reshape(len(GRID), -1)
    assert np.abs(np.corrcoef(z) - np.eye(len(GRID))).max() < 0.5
    assert bt.verdict(local).record["supported"] == pytest.approx(bt.verdict(plain).record["supported"])


def test_grids_are_cut_along_the_longer_keyword():
    def lines(effect, stderr, *, sigma, level):
        theta = bt.tied("theta", bt.Tie.exchangeable(8), sigma, dist.Normal(level, 5.0))
        pyro.sample("y", dist.Normal(theta, stderr).to_event(1), obs=effect)

    over = {"level": [0.0, 4.0], "sigma": [1.0, 2.0, 4.0]}
    with ThreadPoolExecutor(1) as executor:
        tree = bt.sweep(lines, **data(), over=over, executor=executor, **OPTIONS)
    plain = bt.sweep(lines, **data(), over=over, **OPTIONS)
    assert tree.attrs["shards"] == 3
    assert dict(tree.sweep.sizes) == dict(plain.sweep.sizes)
    np.testing.assert_allclose(tree.sweep.log_evidence, plain.sweep.log_evidence, atol=1e-10)


def test_processes_draw_what_one_thread_draws(local):
    events = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        tree = bt.sweep(
            unhurried, **data(), over={"sigma": GRID}, executor=executor, progress=events.append, **OPTIONS
        )
    assert_same_draws(tree, local)
    assert [e["strengths_done"] for e in events][-1] == len(GRID) == events[-1]["strengths_total"]


def test_threads_forks_and_bad_input_are_refused():
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, mp_context=fork) as executor, pytest.raises(OptionError, match="forks"):
        bt.sweep(unhurried, **data(), over={"sigma": GRID}, executor=executor)
    with ThreadPoolExecutor(2) as executor, pytest.raises(OptionError, match="threads share"):
        bt.sweep(unhurried, **data(), over={"sigma": GRID}, executor=executor)
    with pytest.raises(ModelError):
        here(refuses)


def test_an_interrupt_keeps_the_shards_that_are_finished(tmp_path):
    done = []

    def stop(event):
        done.append(event["strengths_done"])
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here(progress=stop, out=tmp_path / "part.nc")
    tree = bt.load(tmp_path / "part.nc")
    assert tree.attrs["interrupted"] == 1
    np.testing.assert_array_equal(tree.sweep.sigma, GRID[: done[-1]])


@pytest.mark.slow
def test_dask_draws_the_same_when_a_worker_dies(local, tmp_path):
    distributed = pytest.importorskip("distributed")
    file = tmp_path / "scheduler.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}

    def start(*command):
        return subprocess.Popen(
            [sys.executable, "-m", *command, "--scheduler-file", str(file)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    loopback = ("--host", "127.0.0.1")
    processes = [start("distributed.cli.dask_scheduler", *loopback, "--port", "0", "--no-dashboard")]
    try:
        options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path))
        processes += [start("distributed.cli.dask_worker", *loopback, *options) for _ in range(2)]
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        killed = []

        def kill_one(event):
            if not killed:
                processes[1].kill()
                killed.append(event["strengths_done"])

        with distributed.Client(scheduler_file=str(file), timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            tree = bt.sweep(
                unhurried, **data(), over={"sigma": GRID}, executor=client.get_executor(),
                progress=kill_one, **OPTIONS,
            )  # fmt: skip
            assert len(client.scheduler_info()["workers"]) == 1
        assert 0 < killed[0] < len(GRID)
        assert_same_draws(tree, local)
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_local_cluster_draws_the_same(local):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run(sys.path.insert, 0, str(ROOT / "tests"))
        client.run(sys.path.insert, 0, str(ROOT))
        tree = bt.sweep(unhurried, **data(), over={"sigma": GRID}, executor=client.get_executor(), **OPTIONS)
    assert_same_draws(tree, local)
