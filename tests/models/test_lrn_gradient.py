"""The closed-form gradient of LRN matches torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import alexnet_pl.models.layers
from alexnet_pl.models.layers import _LocalResponseNorm, local_response_norm


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 5, 7])
def test_lrn_with_kept_denominators_has_the_same_gradient_bit_for_bit(size, dtype, monkeypatch):
    """A CPU keeps them, other devices compute them again; parts of different sizes share the memory between them."""
    monkeypatch.setitem(alexnet_pl.models.layers.PARTS, "cpu", 150)
    x, gradient = (torch.randn(5, 9, 4, 3, dtype=dtype) * 20 for _ in range(2))
    constants = size, 0.1, 0.75, 2.0

    def results(keeps: bool) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = _LocalResponseNorm.apply(leaf, keeps, *constants)[0]
        y.backward(gradient)
        return y.detach(), leaf.grad

    for kept, computed in zip(results(True), results(False), strict=True):
        assert torch.equal(kept, computed)


def test_lrn_keeps_denominators_for_a_gradient_only():
    def count_saved(x: Tensor) -> int:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda _: _):
            local_response_norm(x, 5, 1e-4, 0.75, 2.0)
        return len(saved)

    x = torch.randn(2, 8, 3, 3)
    assert count_saved(x) == 0
    assert count_saved(x.requires_grad_()) == 3  # x, denominators and their powers
    with torch.no_grad():
        assert count_saved(x) == 0
