"""The closed-form gradient of LRN matches torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import alexnet_pl.models.layers
from alexnet_pl.models.layers import local_response_norm


@pytest.mark.parametrize("part", [1, 200, 2**18])
@pytest.mark.parametrize(("size", "beta"), [(1, 0.75), (4, 0.75), (5, 0.75), (5, 0.6)])
def test_lrn_and_its_gradient_match_torch(size, beta, part, monkeypatch):
    monkeypatch.setitem(alexnet_pl.models.layers.PARTS, "cpu", part)
    generator = torch.Generator().manual_seed(size)
    x, gradient = (torch.randn(5, 9, 4, 3, dtype=torch.float64, generator=generator) * 20 for _ in range(2))

    def results(norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(gradient)
        return y.detach(), leaf.grad

    ours = results(lambda x: local_response_norm(x, size, alpha=0.1, beta=beta, k=2.0))
    expected = results(lambda x: F.local_response_norm(x, size, alpha=0.1, beta=beta, k=2.0))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_lrn_accepts_an_empty_batch():
    assert local_response_norm(torch.zeros(0, 4, 2, 2), 5, 1e-4, 0.75, 2.0).shape == (0, 4, 2, 2)
