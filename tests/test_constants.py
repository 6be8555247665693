"""Constants of traced graphs are worked out once."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bayestie._constants import fold_constants

TABLE = torch.linspace(0.1, 2.0, 12, dtype=torch.float64).reshape(3, 4)
X = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64).reshape(5, 4)


def calls(graph):
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def traced(function):
    graph = make_fx(function, _allow_non_fake_inputs=True)(X)
    expected = graph(X).clone()
    before = len(calls(graph))
    fold_constants(graph)
    return graph, expected, before


def test_what_does_not_depend_on_the_input_is_not_computed_again():
    graph, expected, before = traced(lambda x: x @ TABLE.log().exp().mT + torch.ones(3).cumsum(0))
    assert torch.equal(graph(X), expected)
    assert torch.equal(graph(2.0 * X), 2.0 * X @ TABLE.log().exp().mT + torch.ones(3).cumsum(0))
    names = {str(node.target) for node in calls(graph)}
    assert before > len(calls(graph))
    assert not any(word in name for name in names for word in ("log", "exp", "cumsum", "ones"))


def test_parts_of_a_constant_that_is_taken_apart_are_kept():
    graph, expected, _ = traced(lambda x: sum(x @ row for row in TABLE.exp().unbind(0)))
    assert torch.equal(graph(X), expected)
    assert "exp" not in str([node.target for node in calls(graph)])


def test_a_graph_that_writes_is_left_alone():
    def writes(x):
        total = torch.zeros(5, dtype=x.dtype)
        total.add_(x.sum(1))
        return total

    graph, expected, before = traced(writes)
    assert len(calls(graph)) == before
    assert torch.equal(graph(X), expected)
    assert torch.equal(graph(X), expected)  # not twice the sum
