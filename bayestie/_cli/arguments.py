"""Arguments and options of the commands, each with its help; imports nothing heavy."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="The model: path/to/file.py:function or dotted.module:function."),
]
Results = Annotated[Path, typer.Argument(metavar="RESULTS", help="A result: .nc file or .zarr folder.")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|FUNCTION",
        help="Columns by argument name: .csv, .json, .npz or file.py:function. Default: the model's data().",
        rich_help_panel="Model",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Another keyword of the model.", rich_help_panel="Model"
    ),
]
Dims = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SITE=NAME,...", help="Names of a site's dimensions, for labels.", rich_help_panel="Model"
    ),
]
Over = Annotated[
    list[str],
    typer.Option(
        metavar="NAME=VALUES",
        help="Keyword to sweep: sigma=0.1:30:16 (log-spaced) or sigma=0,1,5,inf. Several give a grid.",
        rich_help_panel="Strengths",
    ),
]
Hard = Annotated[
    bool, typer.Option("--hard", metavar="", help="Add 0, one shared parameter.", rich_help_panel="Strengths")
]
Free = Annotated[
    bool,
    typer.Option(
        "--free",
        metavar="",
        help="Add infinity, no sharing (forms copies and matched).",
        rich_help_panel="Strengths",
    ),
]
Schedule = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUES",
        help="Strengths to pass through first, in order: sigma=30:0.1:12 (log-spaced) or sigma=inf,10,1.",
        rich_help_panel="Inference",
    ),
]
Monitor = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SITE",
        help="Judge chains by this site alone, such as a net's predictions: its weights need not mix. "
        "Several times for several.",
        rich_help_panel="Inference",
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="auto, laplace, nuts, svi, pyro_nuts or pyro_svi.", rich_help_panel="Inference"
    ),
]
Seed = Annotated[
    int, typer.Option(metavar="NUMBER", help="Same seed, same draws.", rich_help_panel="Inference")
]
Chains = Annotated[
    int, typer.Option(min=1, metavar="NUMBER", help="Chains per strength.", rich_help_panel="Inference")
]
Draws = Annotated[
    int | None,
    typer.Option(
        min=4, metavar="NUMBER", help="Draws kept per chain; default: enough.", rich_help_panel="Inference"
    ),
]
TargetEss = Annotated[
    int,
    typer.Option(
        "--target-ess", min=1, metavar="NUMBER", help="Effective draws to reach.", rich_help_panel="Inference"
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:0.", rich_help_panel="Inference")
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the result to .nc or .zarr.", rich_help_panel="Output"),
]
ReportTo = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write the HTML report.", rich_help_panel="Output"),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", metavar="", help="Print nothing but errors.", rich_help_panel="Output"),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", metavar="", help="Show the traceback of an error.", rich_help_panel="Output"),
]
