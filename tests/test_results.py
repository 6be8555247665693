"""The results tree: labels, nothing lost on disk, damage noticed, and ArviZ on one strength of it."""

import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import arviz_plots
import arviz_stats
import h5py
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from synthetic import EFFECT, SCHOOLS, STDERR, eight_schools_tree, exact_moments, fit_tree

from bayestie._errors import NameLookupError, OutputError, ResultsFileError, ShapeError
from bayestie._results import build_tree, load, save, select, swept_names, tie_records

SUFFIXES = [".nc", ".zarr"]


def array(tree, path) -> xr.DataArray:
    """`group/name` of a tree."""
    group, name = path.split("/")
    return tree[group].to_dataset()[name]


def small_tree(**changes):
    arguments = {
        "swept": {"sigma": [0.0, 1.0, math.inf]},
        "groups": {
            "posterior": {"theta": np.arange(3 * 2 * 5 * 4.0).reshape(3, 2, 5, 4)},
            "sweep": {"log_evidence": np.array([-1.0, -2.0, -3.0])},
            "observed_data": {"y": np.arange(4.0)},
        },
        "event_dims": {"theta": ["school"]},
        "coords": {"school": ["a", "b", "c", "d"]},
        "attrs": {},
    }
    return build_tree(**{**arguments, **changes})


def rich_tree():
    """One of every type a result or a user's label can have."""
    labels = {
        "year": np.array([1871, 1872, 1873], dtype=np.int32),
        "day": np.array(["1700-01-01", "2020-02-29", "2021-01-01"], dtype="datetime64[D]"),
        "name": ["plain", "Ünïcode ✓", "<script>alert(1)</script>"],
        "dose": [0.1, 1.0, math.inf],
        "flag": [True, False],
        "mixed": ["a", 1, None],
        "lag": np.array([1, 2, 3], dtype="timedelta64[s]"),
    }
    shape = (2, 2, 4)
    posterior: dict[str, Any] = {
        f"by_{dim}": np.random.default_rng(0).normal(size=(*shape, len(values)))
        for dim, values in labels.items()
    }
    posterior["single"] = posterior["by_year"].astype(np.float32)
    return build_tree(
        swept={"sigma": [0.0, math.inf]},
        groups={
            "posterior": posterior,
            "sample_stats": {
                "diverging": np.zeros(shape, dtype=bool),
                "n_steps": np.ones(shape, dtype=np.int32),
            },
            "sweep": {
                "engine": np.array(["laplace", "nuts"]),
                "reason": np.array(["", "a long reason, with ünïcode"]),
                "certified": np.array([True, False]),
                "khat": np.array([-math.inf, math.inf]),
                "log_evidence": np.array([-1.5, 5e-324]),
                "divergences": np.array([0, 12]),
            },
            "constant_data": {
                "scalar": np.array(2.5),
                "none": np.zeros(0),
                "code": np.array([3], dtype=np.uint8),
            },
        },
        event_dims={"single": ["year"], **{f"by_{dim}": [dim] for dim in labels}},
        coords=labels,
        attrs={
            "seed": 3,
            "seconds_total": 1.25,
            "call": "sweep(…)",
            "ties": {"theta": {"edges": [[0, 1]], "nested": {"a": None}}},
            "flag": True,
            "long": "x" * 100_000,
        },
    )


def assert_same(left, right):
    assert left.identical(right)
    assert {node.path for node in left.subtree} == {node.path for node in right.subtree}
    for node in left.subtree:
        for name, variable in node.variables.items():
            other = right[node.path].variables[name]
            assert (variable.dtype, variable.dims) == (other.dtype, other.dims), name
            np.testing.assert_array_equal(variable.values, other.values)
    assert {k: type(v) for k, v in left.attrs.items()} == {k: type(v) for k, v in right.attrs.items()}


def test_dims_and_labels_follow_the_schema():
    tree = eight_schools_tree()
    assert array(tree, "posterior/theta").dims == ("sigma", "chain", "draw", "school")
    assert array(tree, "log_prior/theta").dims == ("sigma", "chain", "draw")
    assert array(tree, "tie_energy/theta").dims == ("sigma", "chain", "draw")
    assert array(tree, "sweep/engine").dims == ("sigma",)
    assert array(tree, "observed_data/y").dims == ("school",)
    assert list(array(tree, "posterior/school").values) == SCHOOLS
    assert tree["posterior_predictive"].sizes["draw"] == 125
    assert list(array(tree, "posterior_predictive/draw").values[:3]) == [0, 2, 4]
    assert swept_names(tree) == ["sigma"]
    assert tie_records(tree)["theta"]["copy_dims"] == ["school"]


def test_default_names_are_those_of_arviz():
    tree = small_tree(event_dims={}, coords={})
    assert array(tree, "posterior/theta").dims[3:] == ("theta_dim_0",)
    assert array(tree, "observed_data/y").dims == ("y_dim_0",)
    assert list(array(tree, "posterior/theta_dim_0").values) == [0, 1, 2, 3]


def test_energy_keeps_the_names_of_the_last_axes():
    arrays = {
        "posterior": {"theta": np.zeros((2, 3, 4, 5))},
        "log_likelihood": {"theta": np.zeros((2, 3, 4))},
        "tie_energy": {"theta": np.zeros((2, 3, 5))},
    }
    tree = small_tree(swept={}, groups=arrays, event_dims={"theta": ["school", "term"]}, coords={})
    assert array(tree, "tie_energy/theta").dims == ("chain", "draw", "term")
    # A multivariate likelihood loses its last axes, not its first.
    assert array(tree, "log_likelihood/theta").dims == ("chain", "draw", "school")
    own = small_tree(swept={}, groups=arrays, event_dims={"tie_energy/theta": ["coefficient"]}, coords={})
    assert array(own, "tie_energy/theta").dims == ("chain", "draw", "coefficient")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"coords": {"school": ["a", "b"]}}, ShapeError, "length 4.*(2,)"),
        ({"event_dims": {"theta": ["chain"]}}, ShapeError, "different name for every axis"),
        ({"event_dims": {"y": ["a/b"]}}, NameLookupError, "'/' in a name"),
        ({"event_dims": {"y": ["y"]}}, NameLookupError, "its own dimensions"),
        ({"groups": {"posterior": {"theta": np.zeros((3, 2))}}}, ShapeError, r"\(3, 2\)"),
        ({"groups": {"posterior": {"a/b": np.zeros((3, 2, 5))}}}, NameLookupError, "'a/b'"),
        ({"groups": {"posterior": {"": np.zeros((3, 2, 5))}}}, NameLookupError, "empty"),
        (
            {"groups": {"posterior": {"a": np.zeros((3, 2, 5, 4)), "b": np.zeros((3, 2, 5, 7))}}}
            | {"event_dims": {"a": ["k"], "b": ["k"]}, "coords": {}},
            ShapeError,
            "length 7.*another variable",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, error, words):
    with pytest.raises(error, match=words):
        small_tree(**changes)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("make", [rich_tree, eight_schools_tree, fit_tree], ids=lambda make: make.__name__)
def test_round_trip_loses_nothing(make, suffix, tmp_path):
    tree = make()
    before = tree.copy(deep=True)
    path = save(tree, tmp_path / f"result{suffix}")
    assert_same(load(path), tree)
    assert_same(before, tree)
    assert os.listdir(tmp_path) == [path.name]
    # A second generation is the same again, and replaces the first.
    save(load(path), path)
    assert_same(load(path), tree)
    assert os.listdir(tmp_path) == [path.name]


def test_attributes_that_are_not_plain_are_json():
    attrs = rich_tree().attrs
    assert json.loads(attrs["ties"])["theta"] == {"edges": [[0, 1]], "nested": {"a": None}}
    assert attrs["flag"] == "true"
    assert (attrs["seed"], attrs["seconds_total"]) == (3, 1.25)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cut_in_half(suffix, tmp_path):
    path = save(eight_schools_tree(), tmp_path / f"result{suffix}")
    if path.is_file():
        os.truncate(path, path.stat().st_size // 2)
    else:
        files = sorted(file for file in path.rglob("*") if file.is_file() and "/c/" in str(file))
        for file in files[len(files) // 2 :]:
            file.unlink()
    with pytest.raises(ResultsFileError, match="result"):
        load(path)


def test_zarr_with_one_lost_chunk_is_not_read_as_zeros(tmp_path):
    path = save(eight_schools_tree(), tmp_path / "result.zarr")
    next(file for file in (path / "posterior" / "theta" / "c").rglob("*") if file.is_file()).unlink()
    with pytest.raises(ResultsFileError, match="/posterior/theta with other values"):
        load(path)


def test_zarr_with_one_lost_variable(tmp_path):
    path = save(eight_schools_tree(), tmp_path / "result.zarr")
    shutil.rmtree(path / "tie_energy" / "theta")
    with pytest.raises(ResultsFileError, match="no /tie_energy/theta"):
        load(path)


def test_netcdf_with_one_changed_number(tmp_path):
    path = save(eight_schools_tree(), tmp_path / "result.nc")
    with h5py.File(path, "r+") as file:
        stored: Any = file["sweep/log_evidence"]
        stored[3] += 1e-12
    with pytest.raises(ResultsFileError, match="/sweep/log_evidence"):
        load(path)


def _text(path):
    path.write_text("year,flow\n1871,1120\n")


def _other_netcdf(path):
    xr.DataTree.from_dict({"posterior": xr.Dataset({"a": ("x", [1.0])})}).to_netcdf(path, engine="h5netcdf")


def _folder(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def _newer(path):
    save(fit_tree(), path)
    with h5py.File(path, "r+") as file:
        file.attrs["bayestie_schema"] = 99


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file"),
        (_text, "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (_other_netcdf, "without bayestie's marks"),
        (_folder, "cannot be read"),
        (_newer, "schema version 99.*version 1"),
    ],
    ids=["missing", "text", "empty", "other netcdf", "folder", "newer"],
)
def test_files_that_are_not_ours(make, words, tmp_path):
    path = tmp_path / "file.nc"
    make(path)
    with pytest.raises(ResultsFileError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/folder/result.nc", "No such file or directory"),
        ("missing/folder/result.zarr", "No such file or directory"),
        ("result.txt", "suffix '.txt'"),
        ("result", "suffix ''"),
        ("file/result.nc", "Not a directory"),
    ],
)
def test_unwritable(name, words, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=words):
        save(fit_tree(), tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    _folder(tmp_path / "result.zarr")
    with pytest.raises(OutputError, match="not a bayestie result"):
        save(fit_tree(), tmp_path / "result.zarr")
    assert (tmp_path / "result.zarr" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_result(error, suffix, tmp_path, monkeypatch):
    path = save(fit_tree(), tmp_path / f"result{suffix}")
    old = load(path)

    def fail(self, place, **options):
        Path(place).mkdir() if suffix == ".zarr" else Path(place).write_bytes(b"half")
        raise error

    monkeypatch.setattr(xr.DataTree, "to_zarr", fail)
    monkeypatch.setattr(xr.DataTree, "to_netcdf", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        save(eight_schools_tree(), path)
    assert_same(load(path), old)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("sigma", [0, 0.0, 30.0, 30.0 * (1 + 5e-7), math.inf])
def test_select_takes_one_strength_of_every_group(sigma):
    tree = eight_schools_tree(form="matched", free=True)
    one = select(tree, sigma=sigma)
    where = int(np.argmin(np.abs(array(tree, "sweep/sigma").values - sigma))) if math.isfinite(sigma) else -1
    for node in one.subtree:
        assert "sigma" not in node.dims
        assert "sigma" not in node.coords
    np.testing.assert_array_equal(array(one, "posterior/theta"), array(tree, "posterior/theta")[where])
    np.testing.assert_array_equal(array(one, "observed_data/y"), array(tree, "observed_data/y"))
    assert swept_names(one) == []
    assert json.loads(one.attrs["selected"]) == {"sigma": array(tree, "sweep/sigma").values[where]}
    assert swept_names(tree) == ["sigma"]
    assert tree["posterior"].sizes["sigma"] == 18


@pytest.mark.parametrize("sigma", [7.0, -1.0, math.nan, 1e-9, 30.0 * (1 + 1e-5), math.inf])
def test_select_lists_the_strengths_there_are(sigma):
    with pytest.raises(NameLookupError, match=r"one of 0, 0\.1, .* 30\. "):
        select(eight_schools_tree(), sigma=sigma)


def test_select_of_a_name_that_was_not_swept():
    with pytest.raises(NameLookupError, match=r"did you mean sigma\?"):
        select(eight_schools_tree(), sigm=1.0)
    with pytest.raises(NameLookupError, match="this tree holds one strength"):
        select(fit_tree(), sigma=5.0)


def test_select_from_a_grid_over_two_keywords():
    tree = build_tree(
        swept={"sigma": [0.0, 1.0], "tau": [1.0, 2.0, 3.0]},
        groups={
            "posterior": {"a": np.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)},
            "sweep": {"elpd": np.eye(2, 3)},
        },
        event_dims={},
        coords={},
        attrs={},
    )
    half = select(tree, tau=2.0)
    assert swept_names(half) == ["sigma"]
    assert array(half, "posterior/a").dims == ("sigma", "chain", "draw")
    whole = select(half, sigma=1)
    assert json.loads(whole.attrs["selected"]) == {"tau": 2.0, "sigma": 1.0}
    np.testing.assert_array_equal(array(whole, "posterior/a"), array(tree, "posterior/a")[1, 1])


def test_selected_tree_survives_the_disk(tmp_path):
    one = select(eight_schools_tree(form="matched", free=True), sigma=math.inf)
    assert_same(load(save(one, tmp_path / "one.nc")), one)


@pytest.mark.parametrize("sigma", [0.0, 0.1, 30.0])
def test_draws_and_evidence_of_the_synthetic_tree_are_exact(sigma):
    one = select(eight_schools_tree(num_draws=1000), sigma=sigma)
    theta = array(one, "posterior/theta").values.reshape(-1, 8)
    mean, sd = exact_moments(sigma, EFFECT, STDERR)
    # i.i.d. draws: 4 standard errors of a mean and of an sd.
    assert np.all(np.abs(theta.mean(0) - mean) < 4 * sd / math.sqrt(len(theta)))
    assert np.all(np.abs(theta.std(0) - sd) < 4 * sd / math.sqrt(2 * len(theta)))
    joint = array(one, "sample_stats/lp") - array(one, "sample_stats/laplace_log_density")
    np.testing.assert_allclose(joint, array(one, "sweep/log_evidence"), atol=1e-9)


class TestArviz:
    """ArviZ 1.x on one strength, for real."""

    @pytest.fixture(params=[0.0, 0.1, 30.0])
    def one(self, request):
        return select(eight_schools_tree(), sigma=request.param)

    def test_summary(self, one):
        table: Any = arviz_stats.summary(one, var_names=["theta", "theta_level"])
        assert len(table) == 9
        assert table.index[0] == "theta[Choate]"
        assert (table["r_hat"].astype(float) < 1.02).all()

    def test_rhat_and_ess(self, one):
        rhat, ess = (f(one, var_names=["theta"]) for f in (arviz_stats.rhat, arviz_stats.ess))
        for values in (rhat["theta"], ess["theta"]):
            assert values.dims == ("school",)
        assert float(rhat["theta"].max()) < 1.02
        assert float(ess["theta"].min()) > 600

    def test_loo_scores_one_strength(self, one):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
            score: Any = arviz_stats.loo(one, pointwise=True)
        assert score.n_data_points == 8
        assert score.elpd == pytest.approx(float(array(one, "sweep/elpd")))

    @pytest.mark.parametrize("plot", ["plot_forest", "plot_trace_dist", "plot_rank_dist"])
    def test_plots(self, one, plot):
        matplotlib.use("agg")
        collection = getattr(arviz_plots, plot)(one, var_names=["theta"], backend="matplotlib")
        figure: Any = collection.get_viz("figure")
        figure.canvas.draw()
        assert any(axes.has_data() for axes in figure.axes)
        plt.close(figure)
