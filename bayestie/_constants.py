"""Of a traced graph, what does not depend on its inputs: worked out once, not at every call."""

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

MOST_KEPT = 20_000_000  # numbers of one constant


def fold_constants(module: GraphModule) -> None:
    """Keep the values of operations on constants alone, in place.

    Data that a model cuts up, and that vmap then repeats for every lane (patches of images, a design), are
    most of what its graph would copy. A graph that writes to a tensor is left alone: it might be a constant.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    calls = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if not any(node.target._schema.is_mutable for node in calls):
        known = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                known[node] = operator.attrgetter(node.target)(module)
            elif node.op == "call_function" and all(one in known for one in node.all_input_nodes):
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                value = node.target(*args, **kwargs)
                if not isinstance(value, Tensor) or value.untyped_storage().nbytes() <= 8 * MOST_KEPT:
                    known[node] = value
        _replace(module, known)
    module.recompile()


def _replace(module: GraphModule, known: dict[Node, object]) -> None:
    for number, (node, value) in enumerate(known.items()):
        # A sequence of tensors, as of unbind, is taken apart by nodes that are known as well.
        needed = any(user not in known for user in node.users)
        if node.op == "get_attr" or not needed or not isinstance(value, Tensor):
            continue
        module.register_buffer(f"_folded_{number}", value)
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(f"_folded_{number}")
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()
