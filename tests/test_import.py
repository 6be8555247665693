"""`import bayestie` is instant, and the public names are what they say."""

import subprocess
import sys

import pytest

import bayestie

HEAVY = ("torch", "pyro", "xarray", "matplotlib", "arviz", "arviz_plots", "typer", "jinja2", "numpy", "scipy")


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy():
    loaded = _python("import sys, bayestie; print(*(set(sys.modules)))").split()
    assert "bayestie" in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_modelling_loads_no_plots_and_no_command_line():
    loaded = _python(
        "import sys, bayestie as bt; bt.Tie; bt.tied; bt.sweep; print(*(set(sys.modules)))"
    ).split()
    assert "pyro" in loaded
    assert sorted({"matplotlib", "arviz_plots", "typer", "jinja2"} & set(loaded)) == []


def test_import_adds_little_to_pyro():
    # Process time, so that a busy machine does not decide; the best of three.
    code = (
        "import time, pyro; began = time.process_time(); import bayestie; print(time.process_time() - began)"
    )
    assert min(float(_python(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("name", bayestie.__all__)
def test_public_name_resolves(name):
    value = getattr(bayestie, name)
    assert value is getattr(bayestie, name)
    assert name in dir(bayestie)


@pytest.mark.parametrize("name", sorted(set(bayestie.__all__) - {"errors", "nn", "plots"}))
def test_public_name_is_documented(name):
    assert (getattr(bayestie, name).__doc__ or "").strip()


def test_every_lazy_name_is_public():
    assert sorted(bayestie.__all__) == sorted([*bayestie._HOMES, *bayestie._MODULES])


def test_unknown_name_says_so():
    with pytest.raises(AttributeError, match="no attribute 'sweeep'"):
        bayestie.sweeep  # noqa: B018  the lookup itself is under test


def test_errors_refine_a_builtin_and_bayestie_error():
    errors = bayestie.errors
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.BayestieError)
    ]
    assert len(classes) > 10
    for cls in set(classes) - {errors.BayestieError}:
        assert any(
            b is not errors.BayestieError and not issubclass(b, errors.BayestieError) and b is not Exception
            for b in cls.__mro__[1:-2]
        ), cls
