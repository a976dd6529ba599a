"""Local response normalization against the paper's formula and torch; pooling against hand-counted windows."""

import copy
import math

import pytest
import torch
from torch import func, nn

from alexnet_pl.models.layers import (
    LocalResponseNorm,
    NonOverlappingMaxPool2d,
    OverlappingMaxPool2d,
    SpatialResponseNorm,
    conv_block,
    local_response_norm,
    pooled_size,
)
from alexnet_pl.runtime.errors import ConfigError

SIX_CHANNELS = torch.arange(1, 7, dtype=torch.float64).mul(100).view(1, 6, 1, 1)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (5e-4, [12.5, 14.865089, 14.461559, 13.465396, 17.402354, 22.642842]),  # the printed formula
        (1e-4, [30.836784, 42.044821, 43.819129, 42.294851, 54.512247, 70.427020]),  # the released code
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lrn_matches_the_papers_formula(alpha, expected, dtype):
    result = local_response_norm(SIX_CHANNELS.to(dtype), size=5, alpha=alpha, beta=0.75, k=2.0)
    torch.testing.assert_close(result.flatten(), torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 9, 10, 13])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_lrn_matches_torch_for_every_window_size(size, channels):
    x = torch.randn(2, channels, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) * 50
    ours = LocalResponseNorm(channels, size=size, alpha=0.1, beta=0.6, k=1.5)(x)
    torch.testing.assert_close(ours, nn.LocalResponseNorm(size, alpha=0.1, beta=0.6, k=1.5)(x))


OURS = LocalResponseNorm(7, size=4, alpha=0.3, beta=0.75, k=2.0)
THEIRS = nn.LocalResponseNorm(4, alpha=0.3, beta=0.75, k=2.0)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 7, 3, 2), (2, 7, 3, 2, 2), (0, 7, 3, 3), (2, 7, 0, 3)], ids=str)
def test_lrn_accepts_the_shapes_that_torch_accepts(shape):
    x = values(*shape).requires_grad_()
    torch.testing.assert_close(OURS(x), THEIRS(x))
    (gradient,) = torch.autograd.grad(OURS(x).square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(THEIRS(x).square().sum(), x)[0])


def test_lrn_refuses_input_without_a_spatial_dimension_as_torch_does():
    for layer in (OURS, THEIRS):
        with pytest.raises(ValueError, match="2"):
            layer(values(2, 7))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_lrn_gradients_of_first_and_second_order_are_right(size, beta):
    x = values(2, 7, 3, 2).requires_grad_()

    def norm(x):
        return local_response_norm(x, size=size, alpha=0.3, beta=beta, k=2.0)

    assert torch.autograd.gradcheck(norm, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(norm, x, check_fwd_over_rev=True)


def test_lrn_gradient_by_parts_is_that_of_the_whole():
    """A CPU works on a few images at a time; 200 images of this shape are several parts."""
    x = values(200, 7, 20, 20).requires_grad_()
    (gradient,) = torch.autograd.grad(OURS(x).square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(THEIRS(x).square().sum(), x)[0])


def _loss(norm):
    return lambda x: norm(x).square().sum()


TRANSFORMS = {
    "grad": lambda norm: func.grad(_loss(norm)),
    "vmap": lambda norm: func.vmap(norm),
    "vmap over dimension 3": lambda norm: func.vmap(norm, in_dims=3, out_dims=1),
    "per-sample gradients": lambda norm: func.vmap(func.grad(_loss(norm))),
    "hessian": lambda norm: func.hessian(_loss(norm)),
    "gradient penalty": lambda norm: func.grad(lambda x: func.grad(_loss(norm))(x).square().sum()),
    "vmap of hessian": lambda norm: func.vmap(func.hessian(_loss(norm))),
    "jacrev": lambda norm: func.jacrev(norm),
    "jacfwd": lambda norm: func.jacfwd(norm),
    "jvp": lambda norm: lambda x: func.jvp(norm, (x,), (x.cos(),)),
    "jvp of vmap": lambda norm: lambda x: func.jvp(func.vmap(norm), (x,), (x.cos(),)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_lrn_matches_torch_under_function_transforms(name):
    x = values(2, 2, 7, 2, 2)
    torch.testing.assert_close(TRANSFORMS[name](OURS)(x), TRANSFORMS[name](THEIRS)(x))


def test_lrn_takes_a_batch_of_gradients():
    x = values(2, 7, 2, 2)
    batched = torch.autograd.functional.jacobian(OURS, x, vectorize=True)
    torch.testing.assert_close(batched, torch.autograd.functional.jacobian(THEIRS, x))


def test_lrn_runs_on_the_meta_device():
    x = torch.empty(2, 7, 3, 3, device="meta", requires_grad=True)
    OURS(x).sum().backward()
    assert x.grad.shape == (2, 7, 3, 3)
    assert x.grad.device.type == "meta"


def test_lrn_can_be_traced_exported_and_compiled():
    net = nn.Sequential(nn.Conv2d(3, 7, 3), LocalResponseNorm(7))
    images = torch.randn(1, 3, 8, 8)
    traced = torch.fx.symbolic_trace(net)
    assert "local_response_norm" in str(traced.graph)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for other in (traced, copy.deepcopy(traced), compiled, torch.export.export(net, (images,)).module()):
        torch.testing.assert_close(other(images), net(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*")
def test_layers_can_be_recorded_by_the_tracer_of_tensorboards_graph():
    net = nn.Sequential(nn.Conv2d(3, 7, 3), LocalResponseNorm(7), OverlappingMaxPool2d(), SpatialResponseNorm(7))
    traced = torch.jit.trace(net, torch.randn(1, 3, 12, 12))
    images = torch.randn(3, 3, 12, 12)
    torch.testing.assert_close(traced(images), net(images))


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0), ("size", -3), ("size", 2.5), ("size", 5.0), ("size", True), ("k", 0), ("k", -1), ("k", math.nan),
        ("k", math.inf), ("alpha", -100), ("alpha", math.nan), ("alpha", math.inf), ("beta", math.nan), ("beta", -1),
        ("beta", math.inf),
    ],
)  # fmt: skip
def test_lrn_refuses_constants_out_of_range(name, value):
    with pytest.raises(ConfigError, match=rf"^model.norm.{name}={str(value).lower()} is invalid: expected "):
        LocalResponseNorm(96, **{name: value})


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", range(3, 32))
def test_both_poolings_have_the_same_output_size(size, padding):
    x = torch.zeros(1, 1, size, size)
    overlapping, disjoint = OverlappingMaxPool2d(padding)(x), NonOverlappingMaxPool2d(padding)(x)
    assert overlapping.shape == disjoint.shape == (1, 1, *[pooled_size(size, padding)] * 2)


@pytest.mark.parametrize(("size", "padding"), [(5, 0), (6, 0), (5, 1), (6, 1)])
def test_non_overlapping_windows_are_2x2_blocks_from_the_corner(size, padding):
    x = torch.arange(size * size, dtype=torch.float32).view(1, 1, size, size)  # the maximum is a window's last value
    pooled = NonOverlappingMaxPool2d(padding)(x)[0, 0]
    for i in range(pooled.shape[0]):
        for j in range(pooled.shape[1]):
            assert pooled[i, j] == x[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max()


def test_invalid_padding_of_the_non_overlapping_pooling_is_refused():
    with pytest.raises(ConfigError, match="model.pool.padding=2 is invalid: expected a whole number from 0 to 1"):
        NonOverlappingMaxPool2d(padding=2)


def test_norm_placement_sets_the_order_of_a_block():
    def names(placement):
        block = conv_block(
            2, nn.Conv2d(3, 4, 3), nn.ReLU, norm=nn.BatchNorm2d, norm_placement=placement, pool=OverlappingMaxPool2d
        )
        return [name for name, _ in block]

    assert names("after_activation") == ["conv2", "act2", "norm2", "pool2"]  # the paper
    assert names("before_activation") == ["conv2", "norm2", "pool2", "act2"]  # the tutorial
    with pytest.raises(ConfigError, match="norm_placement=sideways is invalid: .* before_activation, after_activation"):
        names("sideways")
