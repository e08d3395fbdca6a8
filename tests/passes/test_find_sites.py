"""The pass fills the context and leaves the graph; what counts as a site is tested in tests/test_graph.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import capture, randn, trace


def test_leaves_the_graph_and_finds_the_same_sites_again() -> None:
    captured = capture(nn.Linear(64, 32), [randn(4, 64)])
    captured.run("canonicalise")
    before = [str(node.format_node()) for node in captured.module.graph.nodes]
    assert captured.run("find_sites") == 0
    assert [str(node.format_node()) for node in captured.module.graph.nodes] == before
    found = [(site.node, site.role) for site in captured.sites]
    captured.run("find_sites")
    assert [(site.node, site.role) for site in captured.sites] == found


def test_counts_flops() -> None:
    captured = capture(nn.Linear(64, 32), [randn(2, 4, 64)]).until("find_sites")
    assert {site.role: site.flops for site in captured.sites} == dict.fromkeys(("forward", "wgrad"), 2 * 8 * 64 * 32)


def test_counts_flops_with_the_traced_values_of_symbolic_sizes() -> None:
    captured = trace(lambda x, w: x @ w, randn(4, 64), randn(64, 32), parameters="w", mode="symbolic")
    captured.until("find_sites")
    assert [site.flops for site in captured.sites] == [2 * 4 * 64 * 32]


def test_names_embeddings() -> None:
    def lookup(tokens: Tensor, table: Tensor) -> Tensor:
        return F.embedding(tokens, table) @ table.T

    captured = trace(lookup, torch.zeros(2, 3, dtype=torch.int64), randn(10, 64), parameters="table")
    captured.until("find_sites")
    assert captured.context.embeddings == {"table"}


def test_products_of_activations_are_no_sites() -> None:
    captured = trace(lambda q, k, v: torch.bmm(torch.bmm(q, k.mT), v), *[randn(2, 8, 64)] * 3).until("find_sites")
    assert captured.sites == []


def test_a_graph_of_plain_tensors_alone_is_noted() -> None:
    """A tensor that requires a gradient may be an input as well as a weight."""
    plain = trace(lambda x, w: x @ w, randn(4, 64), randn(64, 32)).until("find_sites")
    assert any("reads no nn.Parameter" in note for note in plain.context.notes)
    named = trace(lambda x, w: x @ w, randn(4, 64), randn(64, 32), parameters="w").until("find_sites")
    assert not named.context.notes


def test_convolutions_are_noted() -> None:
    """A convolution with a kernel of one is a linear layer, and stays as it is."""
    captured = capture(nn.Sequential(nn.Conv1d(16, 16, 1), nn.Linear(64, 32)), [randn(2, 16, 64)]).until("find_sites")
    assert {site.path for site in captured.sites} == {"1"}
    assert [note for note in captured.context.notes if note.startswith("1 convolutions stay")]
