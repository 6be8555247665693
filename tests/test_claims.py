"""Every claim: its analysis finds the number the claim predicts, within an error small enough to tell.

An analysis states what it expects; here the claims' own numbers stand once more, so that neither a wrong
expectation nor an error too wide to exclude anything passes.
"""

import importlib
import math
import re

import pytest

from analyses._claim_pages import index_page
from analyses._claims import Claim, Curve, Finding, Plot

ANALYSES = {
    "adamw_decay": "C13",
    "bias_variance": "C2",
    "bond_types": "C16",
    "capacity": "C1, C10",
    "curriculum": "C8",
    "equivariance": "C14",
    "penalty": "C7",
    "recurrent": "C3",
    "residual_depth": "C4",
    "shared_filter": "C11",
    "siamese": "C6",
    "soft_convolution": "digits",
    "tied_autoencoder": "C9, C12",
    "toeplitz": "C5",
    "transformer_tying": "C15",
}

# Analysis -> words that a finding begins with -> (number of the claim, widest tolerance that still tells).
# Numbers in nats, counts or ratios; None where the number depends on the simulated data.
NUMBERS: dict[str, dict[str, tuple[float, float]]] = {
    "adamw_decay": {
        "zero-mean gradients: power of S in lr": (-0.5, 0.01),
        "zero-mean gradients: power of S in the decay of AdamW": (0, 0.01),
        "mean gradient dominates": (-1.0, 0.01),
        "audit of AdamW": (0, 0.5),
    },
    "bias_variance": {
        "s^2 below e^2/n: risk of hard": (-0.0875, 0.05),
        "s^2 above e^2/n: risk of hard": (0.175, 0.05),
        "threshold of s^2": (0.2, 0.06),
    },
    "bond_types": {
        "single bonds, sigma = 0": (3, 0.3),
        "double bonds, sigma = 0": (6, 0.4),
        "triple bonds, sigma = 0": (9, 0.4),
        "sigma = 0: largest difference": (0, 1e-9),
    },
    "capacity": {
        "32x32x3 to 28x28x8, 5x5: parameters": (608, 0.5),
        "32x32x3 to 28x28x8, 5x5: of the": (476_672, 0.5),
        "256x256x3": (38_654_705_664, 0.5),
        "3x3x3x16": (432, 0.5),
        "9 places: p_eff at sigma = 0": (9, 0.1),
        "9 places: p_eff without sharing": (81, 0.1),
        "p_eff per place, sharing hard": (0, 0.05),
        "p_eff per place, sharing none": (9, 0.05),
    },
    "curriculum": {
        "loss plus log joint": (0, 1e-9),
        "one copy": (0, 0.2),
    },
    "equivariance": {
        "sigma = 0": (0, 1e-12),
        "power of sigma": (1, 0.05),
    },
    "penalty": {
        "sigma = 1: spread": (0, 1e-9),
        "form level: mean": (2, 0.01),
        "form matched: variance": (2, 0.01),
        "sigma = 0: largest difference": (0, 1e-9),
    },
    "recurrent": {
        "cells tied": (0, 1e-9),
        "symmetric W, s sigma_max = 0.5": (math.log(0.5), 1e-9),
        "rotation W, s sigma_max = 2": (math.log(2), 1e-9),
        "autograd": (math.log(0.9), 1e-9),
        "posterior at sigma = 0, true sigma_max 1.25: growth": (math.log(1.25), 0.1),
    },
    "residual_depth": {
        "five blocks": (0, 1e-9),
        "distance of the limit": (0, 1e-9),
        "log convergence rate": (math.log(0.6), 1e-5),
        "posterior at sigma = 0: fixed point, x": (0.5, 0.1),
        "posterior at sigma = 0: spectral radius": (0.6, 0.1),
    },
    "shared_filter": {"T = 4": (0.25, 0.1)},
    "siamese": {
        "branches, sigma = 0:": (0, 1e-9),
        "PyTorch's gradient of a cell": (0, 1e-9),
        "PyTorch's gradient of a kernel": (0, 1e-9),
    },
    "tied_autoencoder": {
        "k = 3: flat directions of the Hessian, untied": (9, 0.5),
        "k = 3: flat directions on the slice": (3, 0.5),
        "k = 2: change of the log joint": (0, 1e-8),
        "sigma = 0: asymmetry": (0, 1e-9),
        "sigma = 0: most negative": (0, 1e-9),
        "k = 1: times that a chain crosses": (0, 0.5),
    },
    "toeplitz": {
        "prior: distance at sigma = 0": (0, 1e-9),
        "prior: power": (1, 0.05),
        "posterior: power": (1, 0.05),
    },
    "transformer_tying": {
        "parameters at sigma = 0": (291, 0.5),
        "parameters without ties": (523, 0.5),
        "output at sigma = 0": (0, 1e-12),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_claim(name, tmp_path, capsys):
    page = tmp_path / "made" / f"{name}.html"
    claim = importlib.import_module(f"analyses.{name}").main(["--smoke", "--seed", "1", "--out", str(page)])
    printed = capsys.readouterr().out
    assert claim.row == ANALYSES[name]
    for finding in claim.findings:
        assert math.isfinite(finding.found) and math.isfinite(finding.error)
        assert finding.holds, f"{finding.what}: expected {finding.wanted}, found {finding.seen}"
        assert finding.what in printed
    for beginning, (number, tolerance) in NUMBERS.get(name, {}).items():
        finding = claim[beginning]
        assert finding.kind == "equal"
        assert finding.expected == pytest.approx(number, rel=1e-12, abs=1e-15)
        assert finding.num_errors * finding.error + finding.rounding <= tolerance
    html = page.read_text(encoding="utf-8")
    assert "<svg" in html and html.count("<tr>") == 1 + len(claim.findings)
    assert f"Report: {page}" in printed


@pytest.mark.slow
def test_full_run_writes_the_report_of_its_sweep(tmp_path, capsys):
    claim = importlib.import_module("analyses.penalty").main(["--out", str(tmp_path / "penalty.html")])
    assert len(claim.paths) == 1 and claim.holds
    assert 'href="penalty_sweep.html"' in (tmp_path / "penalty.html").read_text(encoding="utf-8")
    assert "<html" in (tmp_path / "penalty_sweep.html").read_text(encoding="utf-8")
    assert "C7" in capsys.readouterr().out


@pytest.mark.slow
def test_gallery_shows_every_finding_and_plot(tmp_path, monkeypatch):
    gallery = importlib.import_module("analyses.gallery")
    assert sorted(gallery.ANALYSES) == sorted(ANALYSES)
    monkeypatch.setattr(gallery, "ANALYSES", ("bond_types", "penalty"))
    index = tmp_path / "gallery.html"
    claims = gallery.main(["--smoke", "--out", str(index)])
    text = index.read_text(encoding="utf-8")
    num_findings = sum(len(claim.findings) for claim in claims.values())
    assert text.count("<tr>") == len(claims) + num_findings
    assert f"{num_findings} of {num_findings} findings hold" in text
    assert text.count("<svg") == 2
    # C7 stands before C16, whatever order they ran in.
    assert 0 < text.index('<section id="C7"') < text.index('<section id="C16"')
    for name in claims:
        assert f'href="{name}.html"' in text and (tmp_path / f"{name}.html").exists()


def claim(row, *findings):
    plot = Plot("sigma", "score", [Curve("found", [0.0, 1.0], [0.0, 2.0], [0.1, 0.1])], x_scale="symlog")
    return Claim(row, "a < b", findings, plot)


def test_index_says_what_fails_and_names_each_part_once():
    right, wrong = Finding("right", 1.0, 1.0), Finding("wrong", 1.0, 2.0)
    page = index_page(
        {"late": claim("C9, C12", right, wrong), "early": claim("C2", right), "no": claim("digits")}
    )
    assert "2 of 3 findings hold, <b>1 fails</b>" in page
    assert [page.count(f'href="#{row}"') for row in ("C2", "C9", "C12", "digits")] == [1, 1, 1, 1]
    assert page.count('class="fails"') == 3  # a row of the table, and its claim's two links
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and {"C2", "C9", "C12", "digits"} <= set(ids)
    # What a plot refers to is its own.
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)
    assert "a &lt; b" in page
    assert page == index_page(
        {"late": claim("C9, C12", right, wrong), "early": claim("C2", right), "no": claim("digits")}
    )


def test_every_claim_has_an_analysis():
    rows = {row for claimed in ANALYSES.values() for row in claimed.split(", ")}
    assert rows == {f"C{number}" for number in range(1, 17)} | {"digits"}


def test_every_claim_is_stated_with_its_numbers():
    # Of the digits no number is claimed: what is better than what.
    assert set(NUMBERS) == set(ANALYSES) - {"soft_convolution"}
    assert all(NUMBERS.values())


@pytest.mark.parametrize(
    ("finding", "holds"),
    [
        (Finding("exact", 1.0, 1.0 + 1e-12), True),
        (Finding("exact", 1.0, 1.0 + 1e-8), False),
        (Finding("drawn", 1.0, 1.39, 0.1), True),
        (Finding("drawn", 1.0, 1.41, 0.1), False),
        (Finding("not a number", 1.0, math.nan, 0.1), False),
        (Finding("bound", 1.0, 1.41, 0.1, kind="above"), True),
        (Finding("bound within its error", 1.0, 1.39, 0.1, kind="above"), False),
        (Finding("bound", 1.0, 0.59, 0.1, kind="below"), True),
        (Finding("bound", 1.0, 0.61, 0.1, kind="below"), False),
    ],
)
def test_finding_knows_whether_it_holds(finding, holds):
    assert finding.holds is holds


def test_what_a_limit_may_be_off_is_said():
    assert Finding("slope", 1.0, 1.002, 0.001, rounding=5e-3).wanted == "1 within 0.005"
    assert Finding("slope", 1.0, 1.0).wanted == "1"
    assert Finding("slope", 1.0, 0.5, rounding=5e-3, kind="below").wanted == "< 1"
