"""Cut vertices against their definition: remove the tensor, and no path is left."""

import networkx as nx
import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from gradscope.forward.trunk import find_trunk, vertex


def cut_vertices_by_removal(target, sources) -> set:
    """Tensors whose removal disconnects every source from the target, by trying each."""
    graph = nx.DiGraph()
    stack, seen = [target.node], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        outputs = {t for t in graph if t[0] is node} | ({vertex(target)} if node is target.node else set())
        for parent, number in node.next_functions:
            if parent is None:
                continue
            for output in outputs or {(node, 0)}:
                graph.add_edge((parent, number), output)
            stack.append(parent)
    # A node visited before all of its outputs were known is completed here.
    for parent, number in list(graph):
        for grand, index in parent.next_functions:
            if grand is not None:
                graph.add_edge((grand, index), (parent, number))
    root = "root"
    for source in sources:
        graph.add_edge(root, vertex(source))
    cuts = set()
    for tensor in set(graph) - {root}:
        rest = graph.copy()
        rest.remove_node(tensor)
        if tensor == vertex(target) or not nx.has_path(rest, root, vertex(target)):
            cuts.add(tensor)
    return cuts


def random_network(seed: int):
    """A random program over tensors: unary steps, skips, splits, parameters mixed in."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, requires_grad=True).clone()
    tensors = [x]
    for _ in range(14):
        choice = int(torch.randint(0, 6, (), generator=g))
        recent = tensors[-1]
        older = tensors[int(torch.randint(max(0, len(tensors) - 3), len(tensors), (), generator=g))]
        if choice <= 1:
            tensors.append(torch.tanh(recent))
        elif choice == 2:
            tensors.append(recent + older)
        elif choice == 3:
            a, b = recent.chunk(2, dim=1)
            tensors.append(torch.cat([a, b.sin()], dim=1))
        elif choice == 4:
            tensors.append(recent @ torch.randn(6, 6, requires_grad=True).T)
        else:
            tensors.append(recent * torch.randn(6, requires_grad=True).exp())
    return get_gradient_edge(tensors[-1]), get_gradient_edge(x)


@pytest.mark.parametrize("seed", range(60))
def test_random_networks(seed):
    target, source = random_network(seed)
    trunk = find_trunk(target, [source])
    assert set(trunk.position) == cut_vertices_by_removal(target, [source])
    assert vertex(trunk.edges[-1]) == vertex(target)
    assert vertex(trunk.edges[0]) == vertex(source)


def test_two_inputs_meet_before_the_trunk_begins():
    a, b = (torch.randn(2, 3, requires_grad=True).clone() for _ in range(2))
    joined = a.tanh() + b.sin()
    target = get_gradient_edge(joined.exp())
    trunk = find_trunk(target, [get_gradient_edge(a), get_gradient_edge(b)])
    assert set(trunk.position) == {vertex(get_gradient_edge(joined)), vertex(target)}
    assert trunk.above[vertex(get_gradient_edge(a))] == 0


def test_a_branch_knows_where_it_joins():
    x = torch.randn(2, 3, requires_grad=True).clone()
    h = x.tanh()
    branch = h.sin()
    joined = h + branch
    trunk = find_trunk(get_gradient_edge(joined.exp()), [get_gradient_edge(x)])
    assert trunk.above[vertex(get_gradient_edge(branch))] == trunk.position[vertex(get_gradient_edge(joined))]


def test_a_target_that_no_source_reaches():
    x = torch.randn(2, 3, requires_grad=True).clone()
    with pytest.raises(ValueError, match="no path of the autograd graph"):
        find_trunk(get_gradient_edge(torch.ones(3, requires_grad=True).exp()), [get_gradient_edge(x)])


def test_a_graph_deeper_than_the_python_stack():
    x = torch.randn(2, requires_grad=True).clone()
    h = x
    for _ in range(5000):
        h = h + 1
    assert len(find_trunk(get_gradient_edge(h), [get_gradient_edge(x)]).edges) == 5001
