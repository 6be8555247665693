"""The density of a trace whose enumerated sites are summed out, on all rows of its plates or on some."""

import math
from collections.abc import Mapping
from typing import Any

from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine import Trace
from torch import Tensor

from bayestie._errors import ModelError
from bayestie._messages import is_subsample


def enumerated_log_prob(trace: Any, max_plate_nesting: int, rows: Mapping[str, Tensor]) -> Tensor:
    """log sum over the categories of p(trace), a scalar.

    A plate that holds ``len(rows)`` of ``size`` rows stands for all of them: size / len(rows) times the log
    of the sum over a row's categories. Pyro scales inside of that sum, so sites are taken together by this
    factor, summed without it, and scaled afterwards.

    Raises:
        ModelError: categories shared between rows, whose sum needs all rows at once.
    """
    groups: dict[float, list[str]] = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not is_subsample(node):
            groups.setdefault(_factor(node, rows), []).append(name)
    if set(groups) == {1.0}:
        return TraceEinsumEvaluator(trace, True, max_plate_nesting).log_prob(trace)
    total: Any = 0.0
    seen: dict[int, str] = {}  # axis of a site's categories -> a site that has it
    for factor, names in groups.items():
        part = Trace()
        part.nodes.update((name, trace.nodes[name]) for name in names)
        for name in names:
            node: Any = part.nodes[name]
            node["scale"] = node["scale"] / factor
        evaluator = TraceEinsumEvaluator(part, True, max_plate_nesting)
        for axis, name in _category_axes(part, max_plate_nesting).items():
            if axis in seen:
                raise _shared_categories(seen[axis], name, rows)
            seen[axis] = name
        total = total + factor * evaluator.log_prob(part)
    return total


def _factor(node: Any, rows: Mapping[str, Tensor]) -> float:
    return math.prod(f.full_size / len(rows[f.name]) for f in node["cond_indep_stack"] if f.name in rows)


def _category_axes(trace: Any, max_plate_nesting: int) -> dict[int, str]:
    return {
        axis: name
        for name, node in trace.nodes.items()
        for axis in range(max_plate_nesting + 1, node["log_prob"].dim() + 1)
        if node["log_prob"].shape[-axis] > 1
    }


def _shared_categories(one: str, other: str, rows: Mapping[str, Tensor]) -> ModelError:
    return ModelError(
        f"sites '{one}' and '{other}'",
        found=f"an enumerated site on both sides of a plate with subsample_size, of {sorted(rows)}",
        expected="enumerated sites inside every such plate that depends on them",
        fix="Drop subsample_size: sums over categories that rows share need all rows.",
    )
