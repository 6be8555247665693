"""`report`: the answer, the figures and the diagnostics of a results tree as one HTML file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import xarray as xr
from markupsafe import Markup

from bayestie._errors import BayestieError, OptionError, OutputError
from bayestie._report._sections import sections_of
from bayestie._report._steps import single_step, steps_of
from bayestie._report._sweep_view import SweepView
from bayestie._report._trust import COLUMNS, MOST_ROWS, doubts_of, trust_table
from bayestie._results import swept_names, tie_records
from bayestie._results_files import atomic_place, load
from bayestie._verdict import verdict
from bayestie.plots._style import number

_HERE = Path(__file__).parent
_SUFFIXES = (".html", ".htm")


def report(
    path: xr.DataTree | str | os.PathLike[str], filename: str | os.PathLike[str], *, prior: Any = None
) -> Path:
    """Write one self-contained HTML file that says how much should be shared, and shows why.

    The answer in words comes first; then strength paths, evidence and leave-one-out score, effective
    number of parameters, posterior and replicated data at each strength, the diagnostics, and what
    was run. The file needs no network, reads on a phone and prints.

    Args:
        path: what ``fit`` or ``sweep`` returned, or the name of a file it was saved to.
        filename: where to; ends in .html, and an older file there is replaced.
        prior: prior on the strength for the answer in words, as in ``verdict``.

    Returns:
        The file's path.

    Raises:
        OutputError: the place cannot be written, or its name does not end in .html.
        ResultsFileError: the results file is missing, damaged or not ours.
        OptionError: `path` is neither a tree nor a file name.
    """
    filename = Path(filename)
    if filename.suffix.lower() not in _SUFFIXES:
        raise OutputError(
            str(filename),
            found=f"the suffix {filename.suffix!r}",
            expected="a name that ends in .html",
            fix="Name the report, for example, report.html.",
        )
    if isinstance(path, str | os.PathLike):
        path = load(path)
    elif not isinstance(path, xr.DataTree):
        raise OptionError(
            "path",
            found=f"an object of type {type(path).__name__}",
            expected="the tree that fit or sweep returned, or a file name",
            fix="Pass the result itself.",
        )
    page = render(path, prior=prior)
    with atomic_place(filename) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return filename


def render(tree: xr.DataTree, *, prior: Any = None) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    view = SweepView(tree) if swept_names(tree) else None
    rows = trust_table(tree)
    return environment.get_template("page.html.j2").render(
        title=_title(tree),
        byline=_byline(tree),
        answer=_answer(tree, prior),
        held=view.remark if view else "",
        sections=sections_of(view, prior) if view else [],
        steps=steps_of(view) if view else [single_step(tree)],
        axis_name=view.axis.name if view else "",
        columns=COLUMNS,
        rows=rows[:MOST_ROWS],
        num_rows=len(rows),
        doubts=doubts_of(rows),
        swept_names=", ".join(swept_names(tree)),
        facts=_facts(tree),
        ties=_ties(tree),
        call=str(tree.attrs.get("call", "")),
        # Ours, and they hold no data: the page's own style and script go in as they are.
        style=Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "steps.js").read_text(encoding="utf-8")),
    )


def _answer(tree: xr.DataTree, prior: Any) -> list[str]:
    try:
        text = verdict(tree, prior).text
    except BayestieError as error:
        # A result may hold too little for an answer; what it holds is still worth showing, and so is why.
        return ["This result holds too little to say how much to share.", str(error)]
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _title(tree: xr.DataTree) -> str:
    names = list(tie_records(tree))
    if names and swept_names(tree):
        return f"How much should {_join(names)} be shared?"
    if swept_names(tree):
        return f"{tree.attrs.get('model', 'The model')} along {_join(swept_names(tree))}"
    return (
        f"{tree.attrs.get('model', 'The model')}: {_join(names)}" if names else str(tree.attrs.get("model"))
    )


def _byline(tree: xr.DataTree) -> str:
    parts = [f"Model {tree.attrs['model']}"] if tree.attrs.get("model") else []
    for name in swept_names(tree):
        values = np.sort(tree["sweep"].to_dataset()[name].values)
        parts.append(f"{len(values)} values of {name} from {number(values[0])} to {number(values[-1])}")
    posterior = tree["posterior"].sizes
    parts.append(f"{posterior['chain']} chains of {posterior['draw']} draws each")
    return " · ".join(parts)


def _ties(tree: xr.DataTree) -> list[str]:
    sentences = []
    for name, record in tie_records(tree).items():
        scaled = f", scaled by {record['scale_factor']:.4g}" if record.get("scaled") else ""
        sentences.append(
            f"{name}: {record['num_copies']} copies, {record['kind']} tie{scaled}, form {record['form']}, "
            f"base {record['base']}"
        )
    return sentences


def _facts(tree: xr.DataTree) -> list[tuple[str, str]]:
    attrs = tree.attrs
    seconds = attrs.get("seconds_total")
    known = [
        ("Engine asked for", attrs.get("engine")),
        ("Seed", attrs.get("seed")),
        ("Device", attrs.get("device")),
        ("Time", f"{float(seconds):.3g} seconds" if seconds is not None else None),
        ("Run at", attrs.get("created_at")),
        ("Latent dimensions", attrs.get("num_latent")),
        ("One point of", _selected(attrs)),
    ]
    versions = [(name, attrs.get(f"{name}_version")) for name in ("bayestie", "torch", "pyro", "arviz")]
    return [(name, str(value)) for name, value in known + versions if value not in (None, "")]


def _selected(attrs: dict) -> str:
    chosen = json.loads(attrs.get("selected", "{}"))
    return ", ".join(f"{name} = {number(value)}" for name, value in chosen.items())


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
