"""The report: what stands in the file, how it looks in a browser, and what it refuses."""

import functools
import math
import os
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from browser import faults, look
from synthetic import EFFECT, SCHOOLS, STDERR, eight_schools_tree, fit_tree, normal_means_tree, spoil

from bayestie._errors import OptionError, OutputError, ResultsFileError
from bayestie._report import report
from bayestie._report._report import render
from bayestie._report._trust import trust_table
from bayestie._results import build_tree, save
from bayestie._verdict import verdict

STRENGTHS = (0.0, 0.5, 5.0, 30.0)
SECTIONS = {
    "answer": 0,
    "paths": 1,
    "evidence": 1,
    "prediction": 1,
    "strength": 1,
    "pooling": 1,
    "tension": 1,
    "estimates": 1,
    "steps": 2,
    "diagnostics": 0,
    "run": 0,
}
HOSTILE = "<script>alert('x')</script>"


@functools.cache
def small_tree():
    return normal_means_tree(EFFECT, STDERR, strengths=STRENGTHS, labels=SCHOOLS)


@functools.cache
def page():
    return render(small_tree())


class Reader(HTMLParser):
    """Tags with their attributes, and the text of each element that carries an id."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self._skip = [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skip += tag in ("style", "script")

    def handle_endtag(self, tag):
        self._skip -= tag in ("style", "script")

    def handle_data(self, data):
        if not self._skip:
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def test_the_answer_in_words_comes_first():
    reader = Reader(page())
    sections = [attrs["id"] for attrs in reader.all("section")]
    assert sections == list(SECTIONS)
    answer = " ".join(verdict(small_tree()).text.split())
    assert answer in reader.words
    assert reader.words.index(answer) < reader.words.index("Where each copy goes")


def test_one_file_that_needs_nothing_else():
    text = page()
    assert not re.search(r"(?:https?:)?//[a-z]", text)
    assert "@import" not in text
    reader = Reader(text)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base"}
    assert all("src" not in attrs for _, attrs in reader.tags)
    targets = [attrs["href"] for _, attrs in reader.tags if "href" in attrs]
    assert all(target.startswith("#") for target in targets)
    assert len(text.encode()) < 3_000_000


def test_ids_are_unique_and_every_reference_has_its_target():
    text = page()
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert {a or b for a, b in references} <= set(ids)


def test_every_figure_has_a_caption_and_a_text_alternative():
    reader = Reader(page())
    drawings = reader.all("svg")
    assert len(drawings) == 7 * 2 + len(STRENGTHS) * 2
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 40 for attrs in drawings)
    figures, captions = reader.all("figure"), reader.all("figcaption")
    assert len(figures) == len(captions) == 7 + len(STRENGTHS)
    described = next(attrs["aria-label"] for attrs in drawings if "wide" in attrs["class"])
    assert "Choate" in described
    assert "sigma = 30" in described


def test_labels_of_the_user_stand_in_figures_and_tables():
    text = page()
    for school in SCHOOLS:
        escaped = school.replace("'", "&#39;")
        assert f'<th scope="row">{escaped}</th>' in text
        assert text.count(f">{school}</text>") >= len(STRENGTHS), school


def test_strengths_can_be_stepped_through_without_a_script():
    reader = Reader(page())
    picks = [attrs for attrs in reader.all("input") if attrs["type"] == "radio"]
    panels = [attrs for attrs in reader.all("div") if attrs.get("class") == "panel"]
    assert len(picks) == len(panels) == len(STRENGTHS)
    assert sum("checked" in attrs for attrs in picks) == 1
    for pick, panel in zip(picks, panels, strict=True):
        assert pick["id"] == f"pick-{panel['id']}"
        assert f"body:has(#{pick['id']}:checked) #{panel['id']} {{ display: block; }}" in page()


def test_what_was_run():
    words = Reader(page()).words
    for fact in (
        small_tree().attrs["call"],
        "Seed 0",
        "Device cpu",
        "torch",
        "exchangeable tie",
        "form level",
    ):
        assert fact in words


def test_a_number_that_must_not_be_trusted_is_marked_and_said_not_only_coloured():
    tree = small_tree()
    for sigma, change in (
        (0.5, {"certified": False, "reason": "two modes", "khat": 0.9, "divergences": 12}),
        (5.0, {"max_rhat": 1.2, "min_ess_bulk": 38.0, "min_ess_tail": 21.0}),
        (30.0, {"max_pareto_k": math.inf, "ess_weights": 9.0}),
    ):
        tree = spoil(tree, sigma, **change)
    warnings = {row.short: row.warnings for row in trust_table(tree)}
    assert [len(warnings[name]) for name in ("0.5", "5", "30")] == [3, 3, 2]
    text = render(tree)
    cells = re.findall(r'<td class="bad">(.*?)</td>', text)
    assert len(cells) == sum(map(len, warnings.values())) >= 8
    assert all("✗" in cell and "not to be trusted" in cell for cell in cells)
    words = Reader(text).words
    assert "Not all numbers can be trusted." in words
    assert "two modes" in words
    assert "divergent trajectories" in words


def test_a_clean_table_raises_no_alarm():
    tree = small_tree()
    for sigma in STRENGTHS:
        tree = spoil(tree, sigma, max_pareto_k=0.3)
    text = render(tree)
    assert 'class="bad"' not in text
    assert "Every check passed" in Reader(text).words


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diagnostic_that_is_missing_is_not_taken_for_a_good_one(value):
    (row,) = [row for row in trust_table(spoil(small_tree(), 5.0, max_rhat=value)) if row.short == "5"]
    assert any("R-hat" in warning for warning in row.warnings)


def test_a_bad_khat_of_chains_spoils_their_evidence_and_not_their_draws():
    tree = spoil(spoil(small_tree(), 5.0, khat=0.9, max_pareto_k=0.1), 5.0, ess_weights=math.inf)
    (row,) = [row for row in trust_table(tree) if row.short == "5"]
    assert row.warnings == [
        "evidence by importance sampling unreliable: khat above 0.7 (the draws are not affected)"
    ]


def test_names_are_escaped():
    hostile = normal_means_tree(
        EFFECT, STDERR, strengths=STRENGTHS[:3], labels=[HOSTILE] * 8, dim="<b>dim<b>"
    )
    hostile = rename_site(hostile, "theta", HOSTILE.replace("/", "\\"))
    hostile.attrs.update(model=HOSTILE, call=HOSTILE, device='"><img src=x onerror=alert(1)>')
    hostile = spoil(hostile, 0.0, reason=HOSTILE, engine=HOSTILE, certified=False)
    text = render(hostile)
    reader = Reader(text)
    assert len(reader.all("script")) == 1
    assert "alert" not in "".join(re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL))
    assert not {tag for tag, _ in reader.tags} & {"img", "b" + "dim"}
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert HOSTILE in reader.words


def rename_site(tree, old, new):
    tree = tree.copy(deep=True)
    for group in ("posterior", "log_prior", "tie_energy"):
        data = tree[group].to_dataset()
        names = {old + end: new + end for end in ("", "_level", "_z") if old + end in data}
        tree[group].dataset = data.rename(names)
    tree.attrs["ties"] = tree.attrs["ties"].replace(
        f'"{old}": {{"kind"', f'"{new}": {{"kind"'.replace("\\", "\\\\")
    )
    return tree


@pytest.mark.parametrize("width", [390, 1100])
def test_in_the_browser(width, tmp_path):
    assert faults(page(), tmp_path, width=width, sections=SECTIONS) == []


def test_stepping_in_the_browser(tmp_path):
    _, audit, _ = look(page(), tmp_path, width=1100)
    assert audit is not None
    assert audit["first"]["panels"] == ["s0"]
    assert audit["second"]["panels"] == ["s1"]
    assert audit["third"]["panels"] == ["s2"]
    # Paths, evidence, prediction, pooling, estimates.
    assert len(audit["first"]["rules"]) == 2 * (8 + 2 + 2 + 1 + 1)
    assert all(a != b for a, b in zip(audit["first"]["rules"], audit["second"]["rules"], strict=True))


@pytest.mark.parametrize("width", [390, 1100])
def test_the_screenshot_shows_a_page(width, tmp_path):
    _, _, shot = look(page(), tmp_path, width=width, height=3000)
    pixels = matplotlib.image.imread(shot)[:, :width, :3]
    background = pixels[2, 2]
    inked = np.abs(pixels - background).max(-1) > 0.1
    # Every stretch of the page holds something, and the text's margins stay free.
    assert all(part.any() for part in np.array_split(inked[:2800], 14))
    assert not inked[:, :8].any()


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (
            lambda text: text.replace('"use strict";', 'throw new Error("broken");'),
            "console: Uncaught Error: broken",
        ),
        (
            lambda text: text.replace('querySelectorAll("line.rule")', "nothing()"),
            "console: Uncaught TypeError",
        ),
        (
            lambda text: re.sub(r'<section id="evidence".*?</section>', "", text, flags=re.DOTALL),
            "evidence is missing",
        ),
        (lambda text: re.sub(r"<svg.*?</svg>", "", text, count=2, flags=re.DOTALL), "paths shows 0 drawings"),
        (lambda text: text.replace("<h1>", '<h1 style="width:1500px">'), "1500|pixels wide in a window of"),
        (
            lambda text: text.replace("<h1>", '<img src="missing.png"><h1>'),
            "console: did not load",
        ),
    ],
    ids=["script", "type", "section", "drawing", "width", "resource"],
)
def test_the_browser_test_sees_what_is_broken(broken, complaint, tmp_path):
    text = broken(page())
    assert text != page()
    found = faults(text, tmp_path, width=390, sections=SECTIONS)
    assert any(re.search(complaint, line) for line in found), found


def test_a_missing_browser_is_a_failure_that_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(pytest.fail.Exception, match="apt-get install -y chromium"):
        look(page(), tmp_path, width=390)


def test_a_fit_has_no_strengths_to_compare():
    reader = Reader(render(fit_tree()))
    assert [attrs["id"] for attrs in reader.all("section")] == ["answer", "steps", "diagnostics", "run"]
    assert not reader.all("input")
    assert "cannot say how much to share" in reader.words


def test_hard_and_free_ends_are_marked():
    tree = normal_means_tree(
        EFFECT, STDERR, strengths=(0.0, 0.5, 2.0, 8.0, math.inf), form="matched", labels=SCHOOLS
    )
    text = render(tree)
    assert "0 (hard)" in text
    assert "∞ (free)" in text
    assert ">hard</text>" in text
    assert ">free</text>" in text


@pytest.mark.parametrize("num_copies", [60, 1000])
def test_many_copies_stay_small_and_fit(num_copies, tmp_path):
    generator = np.random.default_rng(3)
    tree = normal_means_tree(
        generator.normal(3, 4, size=num_copies),
        np.full(num_copies, 3.0),
        strengths=(0.0, 0.5, 1.0, 2.0, 4.0),
        labels=[f"district {k}" for k in range(num_copies)],
        num_draws=25,
    )
    text = render(tree)
    assert len(text.encode()) < 3_000_000
    assert faults(text, tmp_path, width=390, sections=SECTIONS) == []


def test_a_grid_over_two_keywords_holds_the_other_where_evidence_is_highest():
    tree = small_tree()
    values = {"sigma": list(STRENGTHS), "tau": [1.0, 2.0]}
    groups = {}
    for name in (
        "posterior",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
        "log_prior",
        "tie_energy",
        "sweep",
    ):
        data = tree[name].to_dataset()
        groups[name] = {str(k): np.stack([v.values, v.values], axis=1) for k, v in data.data_vars.items()}
    groups["sweep"]["log_evidence"] = groups["sweep"]["log_evidence"] + np.array([0.0, 1.0])
    groups["observed_data"] = {"y": EFFECT}
    grid = build_tree(
        swept=values,
        groups=groups,
        event_dims={"theta": ["school"], "theta_z": ["school"], "y": ["school"]},
        coords={"school": SCHOOLS},
        attrs={**{str(k): v for k, v in tree.attrs.items()}, "swept": list(values)},
    )
    reader = Reader(render(grid))
    assert "highest: tau = 2" in reader.words
    assert "sigma = 0.5, tau = 1" in reader.words or "0.5, 1" in reader.words


def test_written_from_a_file_and_whole(tmp_path):
    saved = save(small_tree(), tmp_path / "sweep.nc")
    written = report(saved, tmp_path / "report.html")
    assert written == tmp_path / "report.html"
    assert written.read_text(encoding="utf-8") == page()
    assert sorted(os.listdir(tmp_path)) == ["report.html", "sweep.nc"]


@pytest.mark.parametrize("name", ["no/folder/report.html", "report.nc", "report"])
def test_unwritable(name, tmp_path):
    with pytest.raises(OutputError, match=re.escape(str(tmp_path))):
        report(fit_tree(), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_what_is_not_a_result_is_named(tmp_path):
    with pytest.raises(ResultsFileError, match="no such file"):
        report(tmp_path / "missing.nc", tmp_path / "report.html")
    with pytest.raises(OptionError, match="an object of type dict"):
        report({}, tmp_path / "report.html")  # pyright: ignore[reportArgumentType]  the point of the test


def test_print_leaves_out_the_controls():
    style = re.search(r"@media print \{(.*?)\n\}", page(), flags=re.DOTALL)
    assert style is not None
    assert "fieldset" in style[1]
    assert eight_schools_tree().attrs["model"] in page()
