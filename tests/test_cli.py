"""The `bayestie` command as a user meets it: help, input, results, errors, exit codes."""

import contextlib
import io
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from synthetic import eight_schools_tree, spoil
from typer.testing import CliRunner

import bayestie as bt
from bayestie import errors
from bayestie._cli.data import match_arguments, read_data
from bayestie._cli.loading import load_function
from bayestie._cli.options import parse_dims, parse_over, parse_points, parse_schedule, parse_set
from bayestie._cli.progress import ProgressBars
from bayestie.cli import app, main

SCHOOLS = "models/eight_schools.py:eight_schools"
SHORT = ["--draws", "200", "--target-ess", "100"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading a user's file adds its folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def schools_path():
    return eight_schools_tree()


@pytest.fixture
def schools_file(schools_path, tmp_path):
    return bt.save(schools_path, tmp_path / "schools.nc")


# -- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["fit"], ["sweep"], ["report"], ["show"]])
def test_help_names_the_exit_codes(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    for code in ("0 done", "2 bad input", "3 done, but a strength is not", "4 a file", "130 interrupted"):
        assert code in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", ["", "sweep"])
def test_help_is_instant(command):
    code = (
        "import sys, time; began = time.process_time();"
        f"sys.argv = ['bayestie', *'{command}'.split(), '--help'];"
        "from bayestie.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(time.process_time() - began, *sys.modules, file=sys.stderr)"
    )
    command_line = [sys.executable, "-c", code]
    runs = [subprocess.run(command_line, capture_output=True, text=True, check=True) for _ in range(3)]
    seconds = min(float(done.stderr.split()[0]) for done in runs)
    loaded = set(runs[0].stderr.split()[1:])
    assert sorted(loaded & {"torch", "numpy", "xarray", "pydantic"}) == []
    assert seconds < 0.5


def test_version():
    assert run("--version").stdout.strip() == f"bayestie {bt.__version__}"


# -- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", [SCHOOLS, "models.eight_schools:eight_schools", "models.eight_schools.eight_schools"]
)
def test_a_model_by_path_or_name(spec):
    function, module = load_function(spec)
    assert function.__name__ == "eight_schools"
    assert module.data()["effect"].shape == (8,)


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("models/eight_schools.py", errors.OptionError, "no function named"),
        ("models/eight_schools.py:eight_school", errors.NameLookupError, "Did you mean 'eight_schools'"),
        ("models/eight_school.py:f", errors.NameLookupError, "Did you mean 'eight_schools.py'"),
        ("models.eight_school:f", errors.ModelError, "No module named"),
        ("models/nile.py:SIGMA_ML", errors.NameLookupError, "is not a function"),
    ],
)
def test_a_model_that_is_not_there(spec, kind, words):
    with pytest.raises(kind, match=words):
        load_function(spec)


def test_a_model_file_that_does_not_parse(tmp_path):
    (tmp_path / "broken.py").write_text("def model(:\n")
    with pytest.raises(errors.ModelError, match="syntax error in line 1"):
        load_function(f"{tmp_path}/broken.py:model")


def test_a_model_file_may_import_its_neighbours_and_miss_packages(tmp_path):
    (tmp_path / "neighbour_module.py").write_text("VALUE = 3\n")
    (tmp_path / "good.py").write_text("from neighbour_module import VALUE\ndef model(): return VALUE\n")
    assert load_function(f"{tmp_path}/good.py:model")[0]() == 3
    (tmp_path / "bad.py").write_text("import not_installed_anywhere\ndef model(): pass\n")
    with pytest.raises(errors.ModelError, match="Install 'not_installed_anywhere'"):
        load_function(f"{tmp_path}/bad.py:model")


# -- data --------------------------------------------------------------------------------------------------


def _model(effect, stderr, *, sigma, group=None):
    pass


def _matched(path, **given):
    data, source = read_data(str(path), sys.modules[__name__])
    return match_arguments(_model, data, source, given, ["sigma"])


def test_csv_columns_become_tensors_and_labels(tmp_path):
    path = tmp_path / "schools.csv"
    path.write_text("school,effect,stderr,group,year\nA,28.0,15,north,1\nB,8,10,south,1\nC,,16,north,2\n")
    inputs = _matched(path)
    assert inputs.arguments["effect"].dtype == torch.float64
    assert inputs.arguments["effect"][:2].tolist() == [28, 8]
    assert math.isnan(inputs.arguments["effect"][2])
    assert inputs.arguments["stderr"].tolist() == [15, 10, 16]
    assert inputs.arguments["group"].tolist() == [0, 1, 0]
    assert inputs.coords == {"school": ["A", "B", "C"], "group": ["north", "south"]}
    assert inputs.unused == ["year"]


def test_json_and_npz_columns(tmp_path):
    columns = {"effect": [1.5, 2.5], "stderr": [[1, 2], [3, 4]]}
    (tmp_path / "a.json").write_text(json.dumps(columns | {"coords": {"school": ["A", "B"]}}))
    np.savez(tmp_path / "a.npz", **columns)
    for name, coords in (("a.json", {"school": ["A", "B"]}), ("a.npz", {})):
        inputs = _matched(tmp_path / name)
        assert inputs.coords == coords
        assert {k: v.tolist() for k, v in inputs.arguments.items()} == columns


def test_set_overrides_and_fills_arguments(tmp_path):
    (tmp_path / "a.json").write_text('{"effect": [1.0]}')
    assert _matched(tmp_path / "a.json", stderr=2.0).arguments["stderr"] == 2.0
    with pytest.raises(errors.KeywordError, match=r"'stderr' of model '_model'.*--set stderr=VALUE"):
        _matched(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gone.csv", None, "no such file"),
        ("a.csv", "effect,stderr\n", "1 rows"),
        ("a.csv", "effect,stderr\n1,2\n3\n", "row 3: found 1 values, expected 2"),
        ("a.json", "{", "broken JSON"),
        ("a.json", "[1]", "a JSON list"),
        ("a.json", '{"effect": [[1, 2], [3]], "stderr": 1}', "unequal length"),
        ("a.npz", "nothing", "archive that cannot be read"),
        ("a.csv", "efect,stderr\n1,2\n", "Did you mean 'efect'"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(errors.BayestieError, match=words):
        _matched(tmp_path / name)


def test_data_of_unknown_type():
    with pytest.raises(errors.OptionError, match="neither a known file type nor module:function"):
        _matched("data.parquet")


def test_a_data_function_must_return_a_dictionary(tmp_path):
    (tmp_path / "listed.py").write_text("def data(): return [1]\n")
    with pytest.raises(errors.DataError, match="found a list, expected a dictionary"):
        _matched(f"{tmp_path}/listed.py:data")


# -- options -----------------------------------------------------------------------------------------------


def test_strengths_of_a_range_are_log_spaced_with_the_ends_asked_for():
    values = np.asarray(parse_over(["sigma=0.1:10:3"], hard=True, free=True)["sigma"], dtype=float)
    np.testing.assert_allclose(values, [0.0, 0.1, 1.0, 10.0, math.inf])


def test_strengths_of_a_list_are_sorted_and_unique():
    assert parse_over(["sigma=5,1,inf,1"], hard=True, free=True) == {"sigma": [0.0, 1.0, 5.0, math.inf]}


@pytest.mark.parametrize(
    "option", ["sigma", "sigma=", "=1", "sigma=a", "sigma=1:2", "sigma=1:2:x", "sigma=1:x:3"]
)
def test_strengths_that_cannot_be_read(option):
    with pytest.raises(errors.OptionError, match="--over"):
        parse_over([option], hard=False, free=False)


def test_a_keyword_swept_twice():
    with pytest.raises(errors.OptionError, match="'sigma' twice"):
        parse_over(["sigma=1,2", "sigma=3,4"], hard=False, free=False)


def test_strengths_of_a_schedule_keep_their_order():
    schedule = parse_schedule(["sigma=10:0.1:3", "tau=0.1:10:3"])
    np.testing.assert_allclose(schedule["sigma"], [10.0, 1.0, 0.1])
    np.testing.assert_allclose(schedule["tau"], [0.1, 1.0, 10.0])
    assert parse_schedule(["sigma=inf,10,1"]) == {"sigma": [math.inf, 10.0, 1.0]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["sigma"], "expected name=value"),
        (["sigma=a,1"], "'a'"),
        (["sigma=9:1"], "first:last:number"),
        (["sigma=9:1:x"], "first:last:number"),
        (["sigma=9,5", "sigma=4"], "'sigma' twice"),
    ],
)
def test_schedules_that_cannot_be_read(options, words):
    with pytest.raises(errors.OptionError, match=f"--schedule.*{words}"):
        parse_schedule(options)


def test_settings_points_and_dims():
    settings = parse_set(["a=1", "b=1.5", "c=true", "d=none", "e=word"])
    assert settings == {"a": 1, "b": 1.5, "c": True, "d": None, "e": "word"}
    assert isinstance(settings["a"], int)
    assert parse_points(["sigma=5,tau=inf"]) == [{"sigma": 5.0, "tau": math.inf}]
    assert parse_dims(["theta=row,column"]) == {"theta": ["row", "column"]}


# -- runs --------------------------------------------------------------------------------------------------


def test_sweep_prints_the_answer_and_leaves_result_and_report(tmp_path):
    out, html = tmp_path / "schools.nc", tmp_path / "schools.html"
    result = run("sweep", SCHOOLS, "--over", "sigma=1:10:2", "--hard", *SHORT, "--out", out, "--report", html)
    assert result.exit_code == 0, result.output
    assert "answer" in result.stdout
    assert "log evidence" in result.stdout
    assert str(out) in result.stdout
    tree = bt.load(out)
    np.testing.assert_allclose(tree["posterior"]["sigma"], [0.0, 1.0, 10.0])
    assert list(np.asarray(tree["posterior"]["school"])) == list("ABCDEFGH")
    assert "<html" in html.read_text()


def test_fit_prints_every_labelled_parameter():
    result = run("fit", SCHOOLS, "--set", "sigma=5", *SHORT)
    assert result.exit_code == 0, result.output
    for label in ("theta_level", "theta[A]", "theta[H]"):
        assert label in result.stdout


def test_a_schedule_is_passed_through(tmp_path):
    options = ["--schedule", "sigma=30:3:3", *SHORT]
    swept, fitted = tmp_path / "swept.nc", tmp_path / "fitted.nc"
    assert run("sweep", SCHOOLS, "--over", "sigma=1,5", "--out", swept, *options).exit_code == 0
    assert run("fit", SCHOOLS, "--set", "sigma=2", "--out", fitted, *options).exit_code == 0
    for file in (swept, fitted):
        (stages,) = json.loads(bt.load(file).attrs["schedule"]).values()
        np.testing.assert_allclose(stages, np.geomspace(30.0, 3.0, 3))


def test_fit_of_a_csv_with_labels(tmp_path):
    path = tmp_path / "schools.csv"
    path.write_text("school,effect,stderr\n" + "".join(f"Name{k},{k}.0,10\n" for k in range(8)))
    result = run("fit", SCHOOLS, "--data", path, "--dims", "theta=school", "--set", "sigma=5", *SHORT)
    assert result.exit_code == 0, result.output
    assert "theta[Name7]" in result.stdout


def test_quiet_prints_nothing():
    result = run("fit", SCHOOLS, "--set", "sigma=5", *SHORT, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_show_prints_answer_table_and_one_strength(schools_file):
    result = run("show", schools_file, "--at", "sigma=0")
    assert result.exit_code == 0, result.output
    order = [
        result.stdout.index(words) for words in ("answer", "log evidence", "sigma = 0 ", "theta[Choate]")
    ]
    assert order == sorted(order)


def test_report_goes_beside_the_result(schools_file):
    result = run("report", schools_file)
    assert result.exit_code == 0, result.output
    assert "<html" in schools_file.with_suffix(".html").read_text()


def test_a_strength_that_is_not_certified_is_exit_code_3(schools_path, tmp_path):
    sigma = schools_path["sweep"]["sigma"].values[3]
    tree = spoil(schools_path, sigma, certified=False, reason="khat 0.91 is above 0.7")
    result = run("show", bt.save(tree, tmp_path / "bad.nc"))
    assert result.exit_code == 3
    assert f"sigma={sigma:.4g}: not certified - khat 0.91 is above 0.7" in result.stdout
    assert "NO" in result.stdout


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["sweep", SCHOOLS, "--over", "tau=1,2"], 2, "tau"),
        (["sweep", SCHOOLS, "--over", "sigma=-1,2"], 2, "sigma"),
        (["sweep", SCHOOLS, "--over", "sigma=1,inf"], 2, "inf"),
        (["sweep", SCHOOLS, "--over", "sigma=1,2", "--schedule", "sigma=3,9,1"], 2, "only falls"),
        (["sweep", SCHOOLS, "--over", "sigma=1,2", "--schedule", "tau=3,1"], 2, "tau"),
        (["fit", SCHOOLS], 2, "--set sigma=VALUE"),
        (["fit", SCHOOLS, "--set", "sigma=1", "--engine", "nutz"], 2, "nuts"),
        (["fit", SCHOOLS, "--set", "sigma=1", "--out", "no/such/folder/a.nc"], 4, "no/such/folder"),
        (["fit", SCHOOLS, "--set", "sigma=1", "--out", "a.csv"], 4, ".zarr"),
        (["show", "nowhere.nc"], 4, "nowhere.nc"),
        (["show", "README.md"], 4, "README.md"),
        (["fit"], 2, "MODEL"),
    ],
)
def test_errors_are_one_block_without_a_traceback(arguments, code, words):
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_debug_lets_the_error_through():
    result = run("show", "nowhere.nc", "--debug")
    assert isinstance(result.exception, errors.ResultsFileError)


def test_cuda_that_is_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("fit", SCHOOLS, "--set", "sigma=1", "--device", "cuda")
    assert result.exit_code == 2
    assert "CUDA" in result.stderr


# -- interruption and progress -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finished", "words"), [(True, "already finished are in"), (False, "nothing was written")]
)
def test_an_interrupt_says_what_is_left(monkeypatch, tmp_path, schools_path, finished, words):
    def interrupted(*args, out, **kwargs):
        if finished:
            bt.save(schools_path, out)
        raise KeyboardInterrupt

    monkeypatch.setattr(bt, "sweep", interrupted)
    result = run("sweep", SCHOOLS, "--over", "sigma=1,2", "--out", tmp_path / "part.nc")
    assert result.exit_code == 130
    assert words in " ".join(result.stderr.split())


def test_ctrl_c_leaves_the_finished_strengths(monkeypatch, tmp_path):
    # Tests that were started in the background inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Gaussian at sigma = 0, finished by Laplace at once; a funnel at sigma = 3, which is left to NUTS.
    (tmp_path / "funnel.py").write_text(
        "import pyro, pyro.distributions as dist, torch, bayestie as bt\n"
        "def funnel(y, *, sigma):\n"
        "    theta = bt.tied('theta', bt.Tie.exchangeable(3), sigma, dist.Normal(0., 1.))\n"
        "    v = pyro.sample('v', dist.Normal(0., 3.))\n"
        "    with pyro.plate('row', 3):\n"
        "        pyro.sample('y', dist.Normal(theta * torch.exp(sigma * v), 1.), obs=y)\n"
        "def data():\n"
        "    return {'y': torch.tensor([-1., 0., 4.])}\n"
    )

    @contextlib.contextmanager
    def ctrl_c_during_nuts(quiet, num_strengths):
        yield lambda event: signal.raise_signal(signal.SIGINT) if "nuts" in event.get("stage", "") else None

    monkeypatch.setattr("bayestie.cli._progress", ctrl_c_during_nuts)
    out = tmp_path / "part.nc"
    result = run("sweep", f"{tmp_path}/funnel.py:funnel", "--over", "sigma=0,3", "--out", out)
    assert result.exit_code == 130, result.output
    assert "already finished are in" in " ".join(result.stderr.split())
    assert list(np.asarray(bt.load(out)["sweep"]["sigma"])) == [0.0]
    assert run("show", out).exit_code == 0


def test_progress_shows_strengths_draws_ess_and_time_left():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with ProgressBars(console, 16) as bars:
        bars({"stage": "laplace", "strengths_done": 8, "certified": 8})
        bars({"stage": "nuts", "strengths_done": 9, "draws_done": 12000, "draws_total": 16000})
        bars({"min_ess": 412.4})
        bars._bars.refresh()
    for words in ("nuts", "9/16 strengths, 8 certified", "12,000/16,000 draws", "least ESS 412", "left"):
        assert words in screen.getvalue()


def test_progress_of_a_new_stage_forgets_the_draws_of_the_last():
    screen = io.StringIO()
    with ProgressBars(Console(file=screen, force_terminal=True, width=120), 2) as bars:
        bars({"stage": "nuts", "draws_done": 5, "draws_total": 10, "min_ess": 3.0})
        bars({"stage": "collecting"})
        screen.truncate(0)
        bars._bars.refresh()
    assert "collecting" in screen.getvalue()
    assert "5/10 draws" not in screen.getvalue()


def test_no_progress_where_nobody_watches():
    result = run("fit", SCHOOLS, "--set", "sigma=5", *SHORT)
    assert (result.exit_code, result.stderr) == (0, "")


def test_main_is_the_app(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bayestie", "--version"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert bt.__version__ in capsys.readouterr().out
