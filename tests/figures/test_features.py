"""Features, histograms and activation statistics of a network."""

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_pl.figures.features import (
    activation_stats,
    compute_histogram,
    evaluation_mode,
    extract_features,
    feature_layer,
    kernel_groups,
    pca,
)

HALF = (0.5, 0.5, 0.5)


def test_histograms_match_numpy_and_ignore_non_finite_values():
    values = torch.randn(5000)
    values[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found, finite = compute_histogram(values), values[values.isfinite()].numpy()
    counts, edges = np.histogram(finite, bins=64)
    assert np.abs(found.counts - counts).sum() <= 4  # a value on an edge may fall on either side
    assert np.allclose(found.edges, edges, atol=1e-6)
    assert found.squares == pytest.approx(float((finite**2).sum()), rel=1e-4)
    assert compute_histogram(torch.full((9,), 2.0)).counts.sum() == 9
    assert compute_histogram(torch.tensor([float("nan")])) is None


def test_dead_units_are_counted_per_feature_map_and_per_unit():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Tanh())
    with torch.no_grad():
        net[0].bias[:1], net[3].bias[:3] = -1e6, -1e6
        net[0].bias[1:], net[3].bias[3:] = 1e3, 1e6
    stats = activation_stats(net, torch.rand(6, 3, 4, 4))
    assert {name: layer.dead for name, layer in stats.items()} == {"1": 0.25, "4": pytest.approx(0.6), "5": None}


def test_extracting_features_leaves_the_network_unchanged():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 5))
    net[2].eval()
    before, modes = {n: v.clone() for n, v in net.state_dict().items()}, [m.training for m in net.modules()]
    batch = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, -100, 3, 4])
    state = torch.get_rng_state()
    found = extract_features(net, [batch, batch], HALF, HALF, 8)
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    with evaluation_mode(net):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_principal_axes_preserve_the_distances_between_features():
    features = torch.rand(30, 200) * torch.rand(200)
    turned = pca(features)
    assert turned.shape == (30, 29)
    assert torch.allclose(torch.pdist(turned), torch.pdist(features), atol=1e-5)
    assert torch.all(turned.var(0)[:-1] >= turned.var(0)[1:] - 1e-6)
    assert pca(torch.rand(1, 4)).shape == (1, 1)


def test_networks_without_the_usual_layers():
    """A single linear layer has no convolution, no hidden layer and no activation."""
    batch = torch.randn(3, 3, 2, 2), torch.tensor([0, 1, 0])
    assert feature_layer(nn.Linear(3, 2)) == "last hidden layer"
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert extract_features(net, [batch], HALF, HALF, 5).features.shape == (3, 12)
    assert extract_features(nn.Flatten(), [batch], HALF, HALF, 5) is None
    assert activation_stats(net, torch.randn(3, 3, 2, 2)) == {}


def test_groups_are_those_of_the_second_convolution():
    assert kernel_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2))) == 2
    assert kernel_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))) == 1
    assert kernel_groups(nn.Linear(2, 2)) == 1
