"""The README tells no lie: its tour runs, and its commands name files and options that exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from pyro import poutine
from typer.testing import CliRunner

from bayestie.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language):
    fenced = README.split("```")[1::2]
    return [block.removeprefix(f"{language}\n") for block in fenced if block.startswith(f"{language}\n")]


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python")
    assert len(blocks) == 4
    tour = {}
    exec("\n".join(blocks), tour)
    images, labels = torch.randn(5, 1, 8, 8), torch.arange(5)
    at_once = poutine.trace(tour["soft_convolution"]).get_trace(images, labels, sigma=torch.tensor(0.5))
    assert at_once.nodes["kernel.weight"]["value"].shape == (36, 4, 1, 3, 3)
    assert (tmp_path / "schools.html").exists()
    assert "theta" in capsys.readouterr().out


def test_every_linked_file_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    files = re.findall(r"(?:models|analyses|\.ci)/[\w.]+", README)
    assert len(links) >= 3
    for name in {*links, *(name.removesuffix(".") for name in files)}:
        assert (ROOT / name).exists(), name


def test_every_option_shown_is_an_option():
    commands = [shlex.split(line) for line in "\n".join(_blocks("")).splitlines()]
    parts = [
        words[words.index(name) + 1 :] for words in commands for name in words if name.endswith("bayestie")
    ]
    assert {words[0] for words in parts} == {"fit", "sweep", "show", "report"}
    for command, *words in parts:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        for word in words:
            assert not word.startswith("--") or word in shown
