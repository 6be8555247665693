"""A batched lane function at one width, made faster the longer it is used: eager, traced, compiled.

Eager runs the Pyro model under vmap; traced is the graph of what that did (`make_fx`); compiled is the graph
fused into C++ by torch's Inductor, where the machine has a compiler. Which one runs depends on the number of
calls and on the graph alone, never on a clock: one seed, one result.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from bayestie._constants import fold_constants
from bayestie._errors import first_line
from bayestie._run_context import model_defaults

TIERS = ("eager", "traced", "compiled")
# Tracing a graph costs about as much as this many eager evaluations.
TRACE_AFTER = 100
# Seconds, about, that fusing saves: of an operation, and of each number it makes; and that compiling a graph
# takes, and each operation in it.
_OPERATION, _NUMBER = 5e-6, 3e-10
_COMPILER, _COMPILED_OPERATION = 3.0, 0.02
_AGREE = 1e-10  # relative, of a compiled graph with what it was compiled from

Batched = Callable[..., Any]
# What tracing and compiling raise, in whatever words, where they cannot do something.
_UNABLE = (RuntimeError, ValueError, NotImplementedError, TypeError)


class Tiers:
    """The graphs of one program, by what a call looks like.

    Args:
        quiet: the state in which eager lanes run and are traced.
        dtype: the working precision.
        device: where lanes run; only the CPU's are compiled.
    """

    def __init__(
        self,
        quiet: Callable[[], AbstractContextManager[None]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.quiet, self.dtype, self.device = quiet, dtype, device
        self.calls: Counter[Any] = Counter()
        self.traced: dict[Any, Batched] = {}
        self.compiled: dict[Any, Batched] = {}
        self.buy_at: dict[Any, float] = {}  # calls after which compiling would have cost less
        self.trace_failure: str | None = None  # why there are no graphs, if there are none
        self.compile_failure: str | None = None
        self.before: Tiers | None = None  # whose graphs are taken over where they would be made

    def again(self) -> "Tiers":
        """Anew, but for graphs that were made before: calls are answered as they were the first time."""
        fresh = Tiers(self.quiet, self.dtype, self.device)
        fresh.before = self
        if self.before is not None:  # what this one did not come to
            for name in ("traced", "compiled", "buy_at"):
                setattr(self, name, getattr(self.before, name) | getattr(self, name))
            self.compile_failure = self.compile_failure or self.before.compile_failure
            self.before = None
        return fresh

    @property
    def highest(self) -> str:
        """The fastest tier that any width has reached."""
        return TIERS[2] if self.compiled else TIERS[1] if self.traced else TIERS[0]

    def function(self, key: Any, eager: Batched, arguments: Sequence[Tensor]) -> Batched:
        """What to call with arguments like these.

        Args:
            key: what decides the graph: shapes, names of inputs, whether gradients are wanted.
            eager: the untraced function.
            arguments: of this call.
        """
        found = self.compiled.get(key)
        if found is not None:
            return found
        self.calls[key] += 1
        traced = self.traced.get(key)
        if traced is None and self.calls[key] > TRACE_AFTER and self.trace_failure is None:
            traced = self._trace(key, eager, arguments)
        if traced is None:
            return self._quietly(eager)
        worth = self.calls[key] > self.buy_at[key] and self.device.type == "cpu"
        if worth and self.compile_failure is None:
            return self._compile(key, traced, arguments)
        return traced

    def _quietly(self, eager: Batched) -> Batched:
        def run(*tensors: Tensor) -> Any:
            with self.quiet():
                return eager(*tensors)

        return run

    def _trace(self, key: Any, eager: Batched, arguments: Sequence[Tensor]) -> Batched | None:
        if self.before is not None and key in self.before.traced:
            self.traced[key], self.buy_at[key] = self.before.traced[key], self.before.buy_at[key]
            return self.traced[key]
        try:
            with self.quiet():
                graph = make_fx(eager, _allow_non_fake_inputs=True)(*arguments)
        except _UNABLE as error:
            # Lanes stay a batch, untraced: a model that reads numbers off tensors (a sequential plate).
            self.trace_failure = described(error)
            return None
        with self.quiet():
            fold_constants(graph)

        def traced(*tensors: Tensor) -> Any:
            # A constant that the model made without a dtype is made anew by the graph.
            with model_defaults(self.dtype, torch.device("cpu")):
                return graph(*tensors)

        self.traced[key], self.buy_at[key] = traced, TRACE_AFTER + _calls_worth_compiling(graph)
        return traced

    def _compile(self, key: Any, traced: Batched, arguments: Sequence[Tensor]) -> Batched:
        if self.before is not None and key in self.before.compiled:
            self.compiled[key] = self.before.compiled[key]
            return self.compiled[key]
        if self.before is not None and self.before.compile_failure is not None:
            self.compile_failure = self.before.compile_failure
            return traced
        try:
            compiled = _fused(traced, arguments)
            disagreement = _disagreement(compiled(*arguments), traced(*arguments))
        except (*_UNABLE, OSError, AssertionError, ImportError, LookupError) as error:
            self.compile_failure = described(error)  # no compiler, or an operation that it does not know
            return traced
        if not disagreement <= _AGREE:
            self.compile_failure = f"compiled values are {disagreement:.1e} away from the graph's"
            return traced
        self.compiled[key] = compiled
        return compiled


def _calls_worth_compiling(graph: torch.fx.GraphModule) -> float:
    """After how many calls of a graph compiling it would have saved as much as it costs."""
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    working = [node for node in operations if not _is_view(node)]
    made = [value for node in working for value in tree_leaves(node.meta.get("val"))]
    numbers = sum(value.numel() for value in made if isinstance(value, Tensor))
    saved = _OPERATION * len(working) + _NUMBER * numbers
    return (_COMPILER + _COMPILED_OPERATION * len(operations)) / max(saved, _OPERATION)


def _is_view(node: torch.fx.Node) -> bool:
    if node.target is torch.ops.aten._unsafe_view.default:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(made.alias_info is not None for made in schema.returns)


def _fused(traced: Batched, arguments: Sequence[Tensor]) -> Batched:
    """The function compiled by Inductor for tensors laid out like these."""
    # Here, because the compiler takes two seconds to import.
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    arguments = [x.contiguous() for x in arguments]
    single = isinstance(traced(*arguments), Tensor)

    def tuples(*tensors: Tensor) -> Any:
        out = traced(*tensors)
        return (out,) if single else tuple(out)

    # Inductor takes a graph without views and in-place operations on faith: both are taken out here.
    pure = torch.func.functionalize(tuples, remove="mutations_and_views")
    with _hushed(), config.patch(compile_threads=1):  # no pool of processes is left behind
        graph = make_fx(pure, select_decomp_table(), _allow_non_fake_inputs=True)(*arguments)
        compiled: Any = compile_fx_inner(graph, arguments)

    def run(*tensors: Tensor) -> Any:
        out = compiled([x.contiguous() for x in tensors])
        return out[0] if single else tuple(out)

    return run


@contextmanager
def _hushed() -> Iterator[None]:
    """Without torch's words to its own developers, and about CUDA toolkits without a card."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _disagreement(found: Any, expected: Any) -> float:
    """Largest relative difference; NaN equals NaN, an infinity itself."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    worst = 0.0
    for ours, theirs in pairs:
        gap = (ours - theirs).abs() / (1.0 + theirs.abs())
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        worst = max(worst, float(torch.where(same, 0.0, gap).max()))
    return worst


def described(error: Exception) -> str:
    """An error of another library in a line."""
    return f"{type(error).__name__}: {first_line(error)}"
