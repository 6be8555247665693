"""Graphs as users write them: checked, and split into connected components."""

import math
import operator
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bayestie._components import Component, Graph, Lattice
from bayestie._errors import TieError
from bayestie._layouts import Layout


def count(value: Any, what: str) -> int:
    """A number of copies."""
    try:
        found = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = 0
    if found < 1:
        raise TieError(
            what, found=repr(value), expected="an integer >= 1", fix="A tie needs at least one copy."
        )
    return found


def parent_edges(parents: Any) -> tuple[int, np.ndarray]:
    """Number of nodes and the edges of a forest, from the parent of each node."""
    array = _integers(parents, "parents", 1)
    size = count(len(array), "number of parents")
    for node, parent in enumerate(array.tolist()):
        if not -1 <= parent < size or parent == node:
            raise TieError(
                f"parents[{node}]",
                found=str(parent),
                expected=f"another node in 0 .. {size - 1}, or -1 for a root",
                fix="Number the nodes from 0 and mark every root with -1.",
            )
    children = np.flatnonzero(array >= 0)
    edges = np.stack([array[children], children], -1)
    # A forest has one root per component; every cycle adds a component without a root.
    if _connected(size, edges)[0] != size - len(children):
        raise TieError(
            "parents",
            found="a cycle",
            expected="a path from every node to a root",
            fix="Use Tie.edges for a graph with cycles.",
        )
    return size, edges


def weighted_edges(size: int, edges: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of copies (num_edges, 2) and their weights (num_edges,)."""
    pairs = _integers(edges, "edges", 2)
    if weights is None:
        values = np.ones(len(pairs))
    else:
        rows = weights.tolist() if isinstance(weights, (Tensor, np.ndarray)) else list(weights)
        values = np.asarray(rows, dtype=np.float64)
    if values.shape != (len(pairs),):
        raise TieError(
            "weights",
            found=f"shape {values.shape}",
            expected=f"one per edge, ({len(pairs)},)",
            fix="Give a weight per edge, or none for weights of 1.",
        )
    seen: set[tuple[int, int]] = set()
    for number, ((i, j), weight) in enumerate(zip(pairs.tolist(), values.tolist(), strict=True)):
        where, pair = f"edges[{number}]", (min(i, j), max(i, j))
        if not (0 <= i < size and 0 <= j < size):
            raise TieError(
                where,
                found=f"({i}, {j})",
                expected=f"copies in 0 .. {size - 1}",
                fix="Number copies from 0, and check num_copies.",
            )
        if i == j:
            raise TieError(
                where,
                found=f"the self-loop ({i}, {j})",
                expected="two different copies",
                fix="Leave it out: it ties nothing.",
            )
        if pair in seen:
            raise TieError(
                where,
                found=f"({i}, {j}) again",
                expected="each pair once, in either direction",
                fix="Add its weight to the edge that is already there.",
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise TieError(
                f"weights[{number}]",
                found=str(weight),
                expected="a positive, finite number",
                fix="Leave an edge of weight 0 out.",
            )
        seen.add(pair)
    return pairs, values


def grouped(labels: Any) -> dict[Any, list[int]]:
    """Copies of each label, labels in order of first appearance."""
    listed = list(labels.tolist() if hasattr(labels, "tolist") else labels)
    count(len(listed), "number of labels")
    groups: dict[Any, list[int]] = {}
    for copy, label in enumerate(listed):
        if label is None or label != label:
            raise TieError(
                f"labels[{copy}]",
                found=repr(label),
                expected="the group of the copy",
                fix="Give a copy without a group a label of its own.",
            )
        groups.setdefault(label, []).append(copy)
    # A pandas categorical may hold a category that no copy has.
    categories = getattr(getattr(labels, "cat", labels), "categories", ())
    for category in categories:
        if category not in groups:
            raise TieError(
                "labels",
                found=f"the empty group {category!r}",
                expected="at least one copy in every category",
                fix="Drop it with remove_unused_categories().",
            )
    return groups


def split_graph(size: int, pairs: np.ndarray, weights: np.ndarray, scaled: bool) -> Layout:
    """Split a graph into its connected components."""
    num, labels = _connected(size, pairs)
    copies = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=num))[:-1])
    local = np.empty(size, dtype=np.int64)
    for own in copies:
        local[own] = np.arange(len(own))
    edge_labels = labels[pairs[:, 0]]
    by_component = np.argsort(edge_labels, kind="stable")
    numbers = np.split(by_component, np.cumsum(np.bincount(edge_labels, minlength=num))[:-1])
    parts: list[tuple[Component, np.ndarray]] = []
    for own, edges in zip(copies, numbers, strict=True):
        if len(own) == 1:
            parts.append((Lattice(scaled, (1,)), own))
        else:
            ends = tuple((i, j) for i, j in local[pairs[edges]].tolist())
            parts.append((Graph(scaled, len(own), ends, tuple(weights[edges].tolist())), own))
    return lay_out(parts)


def lay_out(parts: list[tuple[Component, np.ndarray]]) -> Layout:
    """Number components by their first copy."""
    parts = sorted(parts, key=lambda pair: int(pair[1].min()))
    order = np.concatenate([copies for _, copies in parts])
    same = bool((order == np.arange(len(order))).all())
    return Layout(tuple(part for part, _ in parts), None if same else tuple(order.tolist()))


def _integers(values: Any, what: str, ndim: int) -> np.ndarray:
    rows = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
    expected = "integers of shape (num_edges, 2)" if ndim == 2 else "integers of shape (K,)"
    try:
        array = np.asarray(rows)
    except ValueError as ragged:
        raise TieError(
            what, found="rows of unequal length", expected=expected, fix="Give 0-based copy numbers."
        ) from ragged
    if array.size == 0:
        return np.zeros((0, 2) if ndim == 2 else 0, dtype=np.int64)
    if array.ndim != ndim or array.dtype.kind not in "iu" or (ndim == 2 and array.shape[-1] != 2):
        raise TieError(
            what,
            found=f"shape {array.shape} of {array.dtype}",
            expected=expected,
            fix="Give 0-based copy numbers.",
        )
    return array.astype(np.int64)


def _connected(size: int, pairs: np.ndarray) -> tuple[int, np.ndarray]:
    ends = (pairs[:, 0], pairs[:, 1])
    adjacency = coo_array((np.ones(len(pairs)), ends), shape=(size, size))
    num, labels = connected_components(adjacency, directed=False)
    return int(num), np.asarray(labels)
