"""Max pooling: the values and gradients of torch's, bit for bit, also under function transforms."""

import pytest
import torch
import torch.nn.functional as F
from torch import func

from alexnet_pl.models.pooling import max_pool2d

WINDOWS = ((3, 2, 0, False), (3, 2, 1, False), (2, 2, 0, True), (3, 2, 0, True))


def theirs(x: torch.Tensor, kernel_size: int = 3, stride: int = 2, padding: int = 0, ceil_mode: bool = False):
    return F.max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def ours(x: torch.Tensor) -> torch.Tensor:
    return max_pool2d(x, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_values_and_gradients_are_torchs_bit_for_bit(window, dtype):
    """Rectified maps have many ties, which decide where the gradient goes."""
    x = torch.randn(4, 7, 11, 10, generator=torch.Generator().manual_seed(0)).to(dtype).relu().requires_grad_()
    pooled, expected = max_pool2d(x, *window), theirs(x, *window)
    assert torch.equal(pooled, expected)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, wanted = (torch.autograd.grad(result, x, gradient)[0] for result in (pooled, expected))
    assert torch.equal(found, wanted)
    assert pooled.is_contiguous()
    assert found.is_contiguous()  # the layers before would round differently in another memory format


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (3, 5, 5)], ids=str)
def test_other_shapes_are_left_to_torch(shape):
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))


def test_gradients_of_first_and_second_order_are_right():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(ours, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, x)


@pytest.mark.parametrize(
    "transform",
    [
        lambda pool: func.vmap(pool),
        lambda pool: func.vmap(func.grad(lambda x: pool(x).square().sum())),
        lambda pool: func.jacfwd(lambda x: pool(x[0])),
        lambda pool: func.hessian(lambda x: pool(x[0]).square().sum()),
    ],
    ids=["vmap", "per-sample gradients", "jacfwd", "hessian"],
)
def test_function_transforms_give_what_torchs_pooling_gives(transform):
    x = torch.randn(3, 2, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))
