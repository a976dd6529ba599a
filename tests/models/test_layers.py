"""Local response normalisation and pooling against the paper's numbers, torch, and counting by hand."""

import pytest
import torch
from torch import nn

from alexnet_pl.models.layers import (
    LocalResponseNorm,
    NonOverlappingMaxPool2d,
    OverlappingMaxPool2d,
    conv_block,
    local_response_norm,
    pooled_size,
)
from alexnet_pl.runtime.errors import ConfigError

SIX_CHANNELS = torch.arange(1, 7, dtype=torch.float64).mul(100).view(1, 6, 1, 1)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (5e-4, [12.5, 14.865089, 14.461559, 13.465396, 17.402354, 22.642842]),  # the formula as printed
        (1e-4, [30.836784, 42.044821, 43.819129, 42.294851, 54.512247, 70.427020]),  # as it ran
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lrn_gives_the_papers_numbers(alpha, expected, dtype):
    result = local_response_norm(SIX_CHANNELS.to(dtype), size=5, alpha=alpha, beta=0.75, k=2.0)
    torch.testing.assert_close(result.flatten(), torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_lrn_is_torchs_at_every_window_size(size, channels):
    x = torch.randn(2, channels, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) * 50
    ours = LocalResponseNorm(channels, size=size, alpha=0.1, beta=0.6, k=1.5)(x)
    torch.testing.assert_close(ours, nn.LocalResponseNorm(size, alpha=0.1, beta=0.6, k=1.5)(x))


def test_lrn_gradient_is_right():
    x = torch.randn(2, 7, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, size=5, alpha=0.3, beta=0.75, k=2.0), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lrn_does_not_overflow_in_16_bits(dtype):
    x = torch.full((1, 8, 2, 2), 3000.0, dtype=dtype, requires_grad=True)  # its square is beyond float16's 65,504
    with torch.autocast("cpu", torch.bfloat16):
        result = LocalResponseNorm(8)(x)
    result.sum().backward()
    expected = nn.LocalResponseNorm(5, k=2.0)(x.detach().double())
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert x.grad.isfinite().all()


def test_lrn_refuses_what_cannot_work():
    with pytest.raises(ConfigError, match="size=0"):
        LocalResponseNorm(96, size=0)
    with pytest.raises(ConfigError, match="k=0"):
        LocalResponseNorm(96, k=0)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", range(3, 32))
def test_both_poolings_keep_the_same_map_size(size, padding):
    x = torch.zeros(1, 1, size, size)
    overlapping, apart = OverlappingMaxPool2d(padding)(x), NonOverlappingMaxPool2d(padding)(x)
    assert overlapping.shape == apart.shape == (1, 1, *[pooled_size(size, padding)] * 2)


@pytest.mark.parametrize(("size", "padding"), [(5, 0), (6, 0), (5, 1), (6, 1)])
def test_non_overlapping_windows_are_the_2x2_blocks_from_the_corner(size, padding):
    x = torch.arange(size * size, dtype=torch.float32).view(1, 1, size, size)  # the maximum is the last of a window
    pooled = NonOverlappingMaxPool2d(padding)(x)[0, 0]
    for i in range(pooled.shape[0]):
        for j in range(pooled.shape[1]):
            assert pooled[i, j] == x[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max()


def test_padding_of_the_non_overlapping_pooling_is_checked():
    with pytest.raises(ConfigError, match="padding=2"):
        NonOverlappingMaxPool2d(padding=2)


def test_block_order_follows_the_placement():
    def names(placement):
        block = conv_block(
            2, nn.Conv2d(3, 4, 3), nn.ReLU, norm=nn.BatchNorm2d, norm_placement=placement, pool=OverlappingMaxPool2d
        )
        return [name for name, _ in block]

    assert names("after_activation") == ["conv2", "act2", "norm2", "pool2"]  # the paper
    assert names("before_activation") == ["conv2", "norm2", "pool2", "act2"]  # the tutorial
    with pytest.raises(ConfigError, match="norm_placement=sideways.*before_activation or after_activation"):
        names("sideways")
