"""The `bayestie` command: fit, sweep, report, show.

Heavy libraries are imported inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayestie import __version__
from bayestie._cli.arguments import (
    Chains,
    Data,
    Debug,
    Device,
    Dims,
    Draws,
    Engine,
    Free,
    Hard,
    Model,
    Monitor,
    Out,
    Over,
    Quiet,
    ReportTo,
    Results,
    Schedule,
    Seed,
    Set,
    TargetEss,
)
from bayestie._errors import BayestieError, OutputError, ResultsFileError
from bayestie._places import RESULT_SUFFIXES, check_place

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console

REPORT_SUFFIXES = (".html", ".htm")
EXIT_BAD_INPUT, EXIT_NOT_CERTIFIED, EXIT_FILE, EXIT_INTERRUPTED = 2, 3, 4, 130

EPILOG = (
    "[bold]Exit codes[/]  0 done · 1 unexpected error · 2 bad input · 3 done, but a strength is not "
    "trustworthy (its reason is shown) · 4 a file could not be read or written · 130 interrupted"
)

app = typer.Typer(
    name="bayestie",
    help="How much should these parameters be shared? Bayesian parameter tying for Pyro models.",
    epilog=EPILOG,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Said outright, the absent --help of the root command needs no coercion: typer would load pydantic
    # for it, which doubles the time of `bayestie sweep --help`.
    context_settings={"default_map": {"help": False}},
)


def _readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Named errors become one block on stderr and an exit code; --debug lets them through."""

    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            command(*args, debug=debug, **kwargs)
        except KeyboardInterrupt:
            _warn("Interrupted.")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BayestieError as error:
            if debug:
                raise
            from bayestie._cli.errors import error_block

            _console(stderr=True).print(error_block(error))
            bad_file = isinstance(error, OutputError | ResultsFileError)
            raise typer.Exit(EXIT_FILE if bad_file else EXIT_BAD_INPUT) from None

    return wrapped


@app.command(epilog=EPILOG)
@_readable_errors
def fit(
    model: Model,
    data: Data = None,
    set_: Set = None,
    dims: Dims = None,
    engine: Engine = "auto",
    seed: Seed = 0,
    chains: Chains = 4,
    draws: Draws = None,
    target_ess: TargetEss = 400,
    device: Device = None,
    schedule: Schedule = None,
    monitor: Monitor = None,
    out: Out = None,
    report: ReportTo = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit a model at one strength.

    Example: bayestie fit models/eight_schools.py:eight_schools --set sigma=5 --out schools.nc
    """
    job = _Job(model, data, set_ or [], dims or [], {}, out, report, quiet)
    job.run(_inference(engine, seed, chains, draws, target_ess, device, schedule or [], monitor or []))


@app.command(epilog=EPILOG)
@_readable_errors
def sweep(
    model: Model,
    over: Over,
    hard: Hard = False,
    free: Free = False,
    data: Data = None,
    set_: Set = None,
    dims: Dims = None,
    engine: Engine = "auto",
    seed: Seed = 0,
    chains: Chains = 4,
    draws: Draws = None,
    target_ess: TargetEss = 400,
    device: Device = None,
    schedule: Schedule = None,
    monitor: Monitor = None,
    out: Out = None,
    report: ReportTo = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit a model at every strength of a grid, and say how much to share.

    Example: bayestie sweep models/eight_schools.py:eight_schools --over sigma=0.1:30:16 --hard

    Interrupted (Ctrl-C) with --out, it leaves the strengths already finished in that file.
    """
    from bayestie._cli.options import parse_over

    strengths = parse_over(over, hard=hard, free=free)
    job = _Job(model, data, set_ or [], dims or [], strengths, out, report, quiet)
    job.run(_inference(engine, seed, chains, draws, target_ess, device, schedule or [], monitor or []))


@app.command(epilog=EPILOG)
@_readable_errors
def report(
    results: Results,
    html: Annotated[
        Path | None, typer.Argument(metavar="[HTML]", help="Where to; default: beside the result.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the report of a saved result: one HTML file that works offline."""
    import bayestie as bt

    tree = bt.load(results)
    target = html or results.with_suffix(".html")
    check_place(target, REPORT_SUFFIXES)
    bt.report(tree, target)
    _say(f"Report: {target}")
    _leave(tree)


@app.command(epilog=EPILOG)
@_readable_errors
def show(
    results: Results,
    at: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Also the parameters at this strength: --at sigma=5."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the answer of a saved result, and a table of its strengths."""
    import bayestie as bt
    from bayestie._cli.options import parse_points

    tree = bt.load(results)
    _show(tree, parse_points(at or []))
    _leave(tree)


def _inference(
    engine: str,
    seed: int,
    chains: int,
    draws: int | None,
    target_ess: int,
    device: str | None,
    schedule: list[str],
    monitor: list[str],
) -> dict[str, Any]:
    from bayestie._cli.options import parse_schedule

    chosen = {
        "engine": engine,
        "seed": seed,
        "num_chains": chains,
        "target_ess": target_ess,
        "device": device,
        "schedule": parse_schedule(schedule) or None,
        "monitor": monitor or None,
    }
    return chosen if draws is None else chosen | {"num_draws": draws}


@dataclass(frozen=True)
class _Job:
    """A fit (nothing to sweep over) or a sweep, from the words of the command line to what it leaves."""

    model: str
    data: str | None
    settings: list[str]
    dim_names: list[str]
    over: dict[str, Any]
    out: Path | None
    report: Path | None
    quiet: bool

    def run(self, inference: dict[str, Any]) -> None:
        import bayestie as bt
        from bayestie._cli.data import match_arguments, read_data
        from bayestie._cli.loading import load_function
        from bayestie._cli.options import parse_dims, parse_set

        if self.out is not None:
            check_place(self.out, RESULT_SUFFIXES)
        if self.report is not None:
            check_place(self.report, REPORT_SUFFIXES)
        function, module = load_function(self.model)
        columns, source = read_data(self.data, module)
        inputs = match_arguments(function, columns, source, parse_set(self.settings), self.over)
        if inputs.unused and not self.quiet:
            _console(stderr=True).print(f"[dim]Columns not used: {', '.join(inputs.unused)}[/]")
        labels = {"coords": inputs.coords, "dims": inputs.dims | parse_dims(self.dim_names)}
        swept = {"over": self.over} if self.over else {}
        began = time.time()
        try:
            with _progress(self.quiet, math.prod(map(len, self.over.values()))) as progress:
                run = bt.sweep if self.over else bt.fit
                tree = run(
                    function,
                    **inputs.arguments,
                    **swept,
                    **labels,
                    **inference,
                    out=self.out,
                    progress=progress,
                )
        except KeyboardInterrupt:
            self._say_interrupted(began)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        self._leave(tree)

    def _leave(self, tree: xr.DataTree) -> None:
        import bayestie as bt

        if self.report is not None:
            bt.report(tree, self.report)
        if not self.quiet:
            _show(tree, [])
            for name, place in (("Result", self.out), ("Report", self.report)):
                if place is not None:
                    _say(f"{name}: {place}")
        _leave(tree)

    def _say_interrupted(self, began: float) -> None:
        out = self.out
        if out is None:
            _warn("Interrupted. With --out, a sweep keeps the strengths that are finished.")
        elif out.exists() and out.stat().st_mtime >= began - 1:
            _warn(f"Interrupted. The strengths already finished are in {out}: bayestie show {out}")
        else:
            _warn("Interrupted before any strength was finished; nothing was written.")


def _show(tree: xr.DataTree, at: list[dict[str, float]]) -> None:
    import bayestie as bt
    from bayestie._cli.view import overview

    _console().print(overview(tree, str(bt.verdict(tree)), at))


def _leave(tree: xr.DataTree) -> None:
    from bayestie._cli.view import num_uncertified

    if num_uncertified(tree):
        raise typer.Exit(EXIT_NOT_CERTIFIED)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # In a file or a pipe there is no window to fit into, and wrapped tables are unreadable.
    return Console(stderr=stderr, width=None if stream.isatty() or "COLUMNS" in os.environ else 110)


def _say(line: str) -> None:
    _console().print(line, soft_wrap=True, highlight=False, markup=False)


def _warn(line: str) -> None:
    _console(stderr=True).print(line, style="yellow", soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def _progress(quiet: bool, num_strengths: int) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    console = _console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    from bayestie._cli.progress import ProgressBars

    with ProgressBars(console, num_strengths) as bars:
        yield bars


def _short_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    _warn(f"warning: {message}")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bayestie {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    warnings.showwarning = _short_warning


def main() -> None:
    """Entry point of the `bayestie` command."""
    app()


if __name__ == "__main__":
    main()
