"""Every analysis runs from end to end, says the answer and writes its report."""

import importlib
from pathlib import Path

import pytest
from test_claims import ANALYSES as CLAIMS

ANALYSES = ["contraception", "dyestuff", "eight_schools", "lip_cancer", "nile"]


def test_every_analysis_is_tested():
    folder = Path(__file__).parent.parent / "analyses"
    assert sorted(path.stem for path in folder.glob("[!_]*.py")) == sorted([*ANALYSES, *CLAIMS, "gallery"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_smoke(name, tmp_path, capsys):
    report = tmp_path / "made" / f"{name}.html"
    found = importlib.import_module(f"analyses.{name}").main(["--smoke", "--seed", "1", "--out", str(report)])
    paths = found if isinstance(found, tuple) else (found,)
    printed = capsys.readouterr().out
    for path in paths:
        assert path["posterior"].sizes["sigma"] >= 4
        assert path["posterior"]["sigma"].values[0] == 0
        assert path.attrs["seed"] == 1
    reports = sorted(report.parent.glob("*.html"))
    assert len(reports) == len(paths)
    for html in reports:
        assert "<html" in html.read_text(encoding="utf-8")
        assert str(html) in printed
    assert printed.count("Report: ") == len(paths)
