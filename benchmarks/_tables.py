"""Results as one table: on the screen, in Markdown and in JSON."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks._runs import OURS, Result

HEAD = (
    "contender", "cold s", "warm s", "whole process s", "peak MiB", "cold x", "warm x", "whole x",
    "strengths that count", "draws per chain", "centred at", "bulk ESS", "tail ESS", "R-hat", "|z|",
)  # fmt: skip


def rows(results: Sequence[Result], limit: float) -> list[list[str]]:
    """A row per contender; `x` columns are the fastest peer's time over this one's."""
    fastest = {name: _fastest_peer(results, name) for name in ("cold", "warm", "whole")}
    return [_row(result, fastest, limit) for result in results]


def _fastest_peer(results: Sequence[Result], name: str) -> float | None:
    """Of the peers whose result counts; of all that finished, where none does."""
    peers = [r for r in results if r.contender not in OURS and name in r.record and "verdicts" in r.record]
    passed = [r for r in peers if all(v["passed"] for v in r.record["verdicts"])]
    return min((r.record[name] for r in passed or peers), default=None)


def _row(result: Result, fastest: dict[str, float | None], limit: float) -> list[str]:
    record = result.record
    if result.error:
        return [result.contender, result.error, *[""] * (len(HEAD) - 2)]
    cells = [result.contender]
    cells += [_seconds(record, name, result.stopped, limit) for name in ("cold", "warm", "whole")]
    cells.append(f"{record['peak_mib']:.0f}" if "peak_mib" in record else "")
    for name, best in fastest.items():
        cells.append(f"{best / record[name]:.2f}" if best is not None and name in record else "")
    verdicts, num = record.get("verdicts", []), len(result.settings)
    passed = sum(v["passed"] for v in verdicts)
    cells.append(f"{passed} of {num}" if verdicts else f"got to {record.get('done', 0)} of {num}")
    draws = [one["draws"] for one in result.settings]
    cells.append(_span(min(draws), max(draws)))
    cells.append(f"{sum(one['centred'] for one in result.settings)} of {num}")
    if not verdicts:
        return [*cells, "", "", "", ""]
    cells += [f"{min(v[name] for v in verdicts):.0f}" for name in ("bulk", "tail")]
    cells.append(f"{max(v['rhat'] for v in verdicts):.3f}")
    cells.append("" if result.largest_z is None else f"{result.largest_z:.1f}")
    return cells


def _seconds(record: dict[str, Any], name: str, stopped: bool, limit: float) -> str:
    if name in record:
        return f"{record[name]:.2f}"
    if name == "warm" and "whole" in record:  # the limit is the process's
        limit -= record["whole"]
    return f"> {limit:.0f}" if stopped else ""


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def screen(title: str, table_rows: Sequence[Sequence[str]], head: Sequence[str] = HEAD) -> Table:
    table = Table(*head, title=title, title_justify="left")
    for row in table_rows:
        table.add_row(*row)
    return table


def markdown(title: str, table_rows: Sequence[Sequence[str]], head: Sequence[str] = HEAD) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table_rows]
    return "\n".join(lines) + "\n"
