"""Laws of ties: every kind against dense linear algebra on its edges."""

import json
import math
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tie_kinds import TIES, component_copies, dense_inverse, laplacian

from bayestie import Tie
from bayestie._errors import ShapeError, TieError


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


every_tie = pytest.mark.parametrize("tie", TIES.values(), ids=TIES.keys())
spectral = pytest.mark.parametrize(
    "tie",
    [tie for tie in TIES.values() if not (tie.has_hub or tie.anchored)],
    ids=[name for name, tie in TIES.items() if not (tie.has_hub or tie.anchored)],
)


def check_spectrum(tie: Tie) -> None:
    basis = tie.synthesize(torch.eye(tie.rank)).mT
    torch.testing.assert_close(basis.mT @ basis, torch.eye(tie.rank), rtol=0, atol=1e-12)
    dense = (basis * tie.eigenvalues) @ basis.mT
    torch.testing.assert_close(dense, laplacian(tie)[: tie.num_copies, : tie.num_copies], rtol=0, atol=1e-11)


@spectral
def test_eigenpairs_rebuild_the_laplacian(tie):
    check_spectrum(tie)


@spectral
def test_log_pseudo_determinant(tie):
    values = torch.linalg.eigvalsh(laplacian(tie)[: tie.num_copies, : tie.num_copies])
    expected = values[tie.num_components :].log().sum().item()
    assert tie.log_pseudo_determinant == pytest.approx(expected, rel=1e-10, abs=1e-10)


@every_tie
def test_analysis_inverts_synthesis(tie):
    coefficients = torch.randn(2, 3, tie.rank)
    values = tie.synthesize(coefficients)
    assert values.shape == (2, 3, tie.num_copies)
    torch.testing.assert_close(tie.analyze(values), coefficients)


@every_tie
def test_transforms_agree_with_the_dense_route(tie):
    coefficients, values = torch.randn(2, tie.rank), torch.randn(2, tie.num_copies)
    by_transforms = tie.layout.synthesize_by_transforms(coefficients)
    torch.testing.assert_close(by_transforms, tie.synthesize(coefficients), rtol=1e-11, atol=1e-12)
    by_transforms = tie.layout.analyze_by_transforms(values)
    torch.testing.assert_close(by_transforms, tie.analyze(values), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "tie",
    [Tie.chain(299), Tie.chain(300), Tie.ring(299), Tie.ring(300), Tie.grid(17, 20), Tie.complete(300)],
    ids=repr,
)
def test_structured_kinds_never_need_their_matrix(tie):
    check_spectrum(tie)
    assert not any("synthesis" in key[0] for key in tie.layout.__dict__.get("_casts", {}))


@every_tie
def test_resistances(tie):
    """R_e against the dense pseudo-inverse, and sum of w_e R_e = K - c, hubs counted as nodes."""
    inverse = torch.linalg.pinv(laplacian(tie), rtol=1e-12)
    i, j = tie.edge_index
    expected = inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]
    found = tie.effective_resistances()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    num_hubs = sum(part.hub for part in tie.components)
    total = (tie.edge_weights * found).sum().item()
    assert total == pytest.approx(tie.num_copies + num_hubs - tie.num_components, abs=1e-10)


@every_tie
@pytest.mark.parametrize("event_shape", [(), (2,), (2, 3)])
def test_energy_is_the_sum_over_edges(tie, event_shape):
    several = tie.num_components > 1
    theta = torch.randn(4, tie.num_copies, *event_shape)
    level = torch.randn(4, *((tie.num_components,) if several else ()), *event_shape)
    nodes = torch.cat([theta, level if several else level.unsqueeze(1)], 1)
    i, j = tie.edge_index
    weights = tie.edge_weights.reshape(-1, *(1,) * len(event_shape))
    expected = (weights * (nodes[:, i] - nodes[:, j]).square()).sum(1)
    found = tie.energy(theta, level, event_dim=len(event_shape))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    shared = nodes[:, tie.num_copies :][:, tie.labels]
    assert (tie.energy(shared, level, event_dim=len(event_shape)) == 0).all()


@every_tie
def test_diagonal(tie):
    """Prior variances of the deviations at sigma = 1."""
    expected = dense_inverse(tie).diagonal()
    torch.testing.assert_close(tie.diagonal(1 / tie.eigenvalues), expected, rtol=1e-9, atol=1e-12)


def test_chain_variances_in_closed_form():
    num = 7
    step = torch.arange(1, num) / num
    variances = torch.stack([step[:k].square().sum() + (1 - step[k:]).square().sum() for k in range(num)])
    tie = Tie.chain(num)
    torch.testing.assert_close(tie.diagonal(1 / tie.eigenvalues), variances)
    assert tie.typical_variance.item() == pytest.approx(variances.log().mean().exp().item())


@every_tie
def test_scaled_ties_have_deviations_of_variance_one(tie):
    scaled = Tie.disjoint(tie, scaled=True)
    assert scaled.scaled
    torch.testing.assert_close(scaled.typical_variance, tie.typical_variance)
    for part, copies in zip(scaled.components, component_copies(scaled), strict=True):
        if part.anchored or len(copies) == 1:
            continue
        variances = dense_inverse(scaled)[copies, copies]
        assert variances.log().mean().item() == pytest.approx(0, abs=1e-9)
    ratio = scaled.edge_weights / tie.edge_weights
    of_edge = tie.labels[tie.edge_index[0]]
    torch.testing.assert_close(ratio, (scaled.scale_factor / tie.scale_factor)[of_edge])


def test_an_anchored_chain_scales_like_the_chain():
    assert torch.equal(
        Tie.chain(5, anchored=True, scaled=True).scale_factor, Tie.chain(5, scaled=True).scale_factor
    )


def test_kinds_that_are_the_same_graph_agree():
    chain, grid, tree = Tie.chain(6), Tie.grid(1, 6), Tie.tree([-1, 0, 1, 2, 3, 4])
    for other in (grid, tree, Tie.edges(6, chain.edge_index.T)):
        torch.testing.assert_close(other.eigenvalues, chain.eigenvalues)
    triangle = Tie.edges(3, [(0, 1), (1, 2), (2, 0)])
    for other in (Tie.ring(3), Tie.complete(3)):
        torch.testing.assert_close(other.eigenvalues, triangle.eigenvalues)


@st.composite
def graphs(draw):
    num = draw(st.integers(1, 7))
    pairs = [(i, j) for i in range(num) for j in range(i)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    weights = draw(st.lists(st.floats(0.1, 10), min_size=len(chosen), max_size=len(chosen)))
    return num, chosen, weights


@settings(max_examples=60, deadline=None)
@given(graphs(), st.booleans())
def test_laws_of_any_graph(graph, scaled):
    num, pairs, weights = graph
    tie = Tie.edges(num, pairs, weights, scaled=scaled)
    check_spectrum(tie)
    assert tie.rank == num - tie.num_components == len(tie.eigenvalues)
    total = (tie.edge_weights * tie.effective_resistances()).sum().item()
    assert total == pytest.approx(tie.rank, abs=1e-9)
    firsts = [tie.labels.tolist().index(c) for c in range(tie.num_components)]
    assert firsts == sorted(firsts)
    assert all(tie.labels[i] == tie.labels[j] for i, j in pairs)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_groups_follow_their_labels(labels):
    tie = Tie.groups(labels, within=Tie.complete)
    order = list(dict.fromkeys(labels))
    assert tie.labels.tolist() == [order.index(label) for label in labels]
    check_spectrum(tie)


@pytest.mark.parametrize(
    "labels",
    [
        ["x", "y", "x"],
        torch.tensor([7, 2, 7]),
        np.array([1.5, 0.5, 1.5]),
        [("a", 1), ("b", 1), ("a", 1)],
        pd.Series(pd.Categorical(["u", "v", "u"])),
    ],
    ids=["str", "tensor", "array", "tuple", "categorical"],
)
def test_labels_of_any_kind(labels):
    tie = Tie.groups(labels)
    assert tie.labels.tolist() == [0, 1, 0]
    assert tie.edge_index.tolist() == [[0, 2, 1], [3, 3, 4]]  # hub of component j is node K + j


def test_disjoint_numbers_copies_tie_after_tie():
    tie = Tie.disjoint(Tie.groups("aba"), Tie.chain(2))
    assert tie.labels.tolist() == [0, 1, 0, 2, 2]
    assert tie.edge_index.tolist() == [[0, 2, 1, 3], [5, 5, 6, 4]]


def test_components_of_a_graph_keep_their_edges_and_weights():
    tie = Tie.edges(5, [(0, 3), (2, 4), (3, 1)], [1.0, 2.0, 3.0])
    found = {
        tuple(sorted(pair)): w
        for pair, w in zip(tie.edge_index.T.tolist(), tie.edge_weights.tolist(), strict=True)
    }
    assert found == {(0, 3): 1.0, (2, 4): 2.0, (1, 3): 3.0}
    assert tie.labels.tolist() == [0, 0, 1, 0, 1]


@every_tie
def test_ties_are_values(tie):
    tie.synthesize(torch.randn(tie.rank))
    copy = pickle.loads(pickle.dumps(tie))
    assert copy == tie and hash(copy) == hash(tie)
    assert "_casts" not in copy.layout.__dict__
    torch.testing.assert_close(copy.eigenvalues, tie.eigenvalues)
    assert len(repr(tie)) < 60
    described = json.loads(json.dumps(tie.describe()))
    assert described["num_copies"] == tie.num_copies and len(described["edges"]) == tie.num_edges
    assert len(described["scale_factor"]) == tie.num_components


def test_ties_cannot_be_changed():
    tie: Any = Tie.chain(3)
    with pytest.raises(AttributeError):
        tie.kind = "ring"
    assert Tie.chain(3) != Tie.chain(4) and Tie.chain(3) != Tie.chain(3, scaled=True)


def test_large_ties_are_described_without_their_edges():
    tie = Tie.chain(1_000_000)
    assert "edges" not in tie.describe() and tie.num_edges == 999_999


def test_float32_inputs_stay_float32():
    tie = Tie.ring(7)
    assert tie.synthesize(torch.randn(6, dtype=torch.float32)).dtype == torch.float32
    assert tie.energy(torch.randn(7, dtype=torch.float32)).dtype == torch.float32


WRONG: dict[str, Any] = {
    "fraction": 2.5,
    "categorical": pd.Categorical(["a", "b"], categories=["a", "b", "c"]),
}
BAD = {
    "no copies": (lambda: Tie.chain(0), "num_copies: found 0"),
    "fraction": (lambda: Tie.complete(WRONG["fraction"]), "num_copies: found 2.5"),
    "no axis": (Tie.grid, "number of axes: found 0"),
    "axis": (lambda: Tie.grid(3, 0), "shape: found 0"),
    "range": (
        lambda: Tie.edges(3, [(0, 1), (1, 3)]),
        r"edges\[1\]: found \(1, 3\), expected copies in 0 .. 2",
    ),
    "negative": (lambda: Tie.edges(3, [(0, -1)]), r"edges\[0\]: found \(0, -1\)"),
    "loop": (lambda: Tie.edges(3, [(1, 1)]), r"edges\[0\]: found the self-loop"),
    "twice": (lambda: Tie.edges(3, [(0, 1), (1, 0)]), r"edges\[1\]: found \(1, 0\) again"),
    "zero weight": (lambda: Tie.edges(3, [(0, 1)], [0.0]), r"weights\[0\]: found 0.0"),
    "negative weight": (lambda: Tie.edges(3, [(0, 1)], [-1.0]), r"weights\[0\]: found -1.0"),
    "nan weight": (lambda: Tie.edges(3, [(0, 1)], [math.nan]), r"weights\[0\]: found nan"),
    "inf weight": (lambda: Tie.edges(3, [(0, 1)], [math.inf]), r"weights\[0\]: found inf"),
    "number of weights": (lambda: Tie.edges(3, [(0, 1)], [1.0, 2.0]), r"weights: found shape \(2,\)"),
    "edge shape": (lambda: Tie.edges(3, [(0, 1, 2)]), r"edges: found shape \(1, 3\)"),
    "ragged edges": (lambda: Tie.edges(3, [(0, 1), (2,)]), "edges: found rows of unequal length"),
    "float edges": (lambda: Tie.edges(3, np.array([[0.0, 1.0]])), "edges: found shape .* float64"),
    "cycle": (lambda: Tie.tree([1, 2, 0, -1]), "parents: found a cycle"),
    "two-cycle": (lambda: Tie.tree([1, 0]), "parents: found a cycle"),
    "parent range": (lambda: Tie.tree([-1, 5]), r"parents\[1\]: found 5"),
    "own parent": (lambda: Tie.tree([-1, 1]), r"parents\[1\]: found 1"),
    "empty tree": (lambda: Tie.tree([]), "number of parents: found 0"),
    "no label": (lambda: Tie.groups([]), "number of labels: found 0"),
    "missing label": (lambda: Tie.groups(["a", None]), r"labels\[1\]: found None"),
    "nan label": (lambda: Tie.groups(np.array([1.0, np.nan])), r"labels\[1\]: found nan"),
    "empty group": (
        lambda: Tie.groups(WRONG["categorical"]),
        "labels: found the empty group 'c'",
    ),
    "within": (lambda: Tie.groups("aab", lambda size: Tie.chain(2)), r"within\(1\), group 'b'"),
    "nothing": (Tie.disjoint, "number of ties: found 0"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_graphs_are_named(make, message):
    with pytest.raises(TieError, match=message):
        make()


def test_energy_names_a_wrong_shape():
    with pytest.raises(ShapeError, match=r"theta: found shape \(4,\), expected 3 copies at dim -1"):
        Tie.chain(3).energy(torch.zeros(4))
    with pytest.raises(ShapeError, match="level: found None"):
        Tie.exchangeable(3).energy(torch.zeros(3))
