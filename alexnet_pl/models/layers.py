"""The layers AlexNet is composed of, and the factories that make them interchangeable.

A network takes three factories and calls them where a layer is due, so that a variant is a different factory and
nothing else:

- ``norm(channels)``: a normalisation of ``(N, channels, H, W)`` maps (``conf/model/norm``);
- ``pool(padding)``: a max pooling with stride 2 (``conf/model/pool``);
- ``activation()``: an elementwise non-linearity (``conf/model/activation``).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alexnet_pl.runtime.errors import ConfigError

NormFactory = Callable[[int], nn.Module]

PoolFactory = Callable[[int], nn.Module]

ActivationFactory = Callable[[], nn.Module]

NORM_PLACEMENTS = ("before_activation", "after_activation")


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Local response normalisation across channels (paper, section 3.3), in torch's convention for alpha.

    ``y_c = x_c / (k + alpha / size * sum of x_j^2 over the size channels around c) ** beta``. The paper's printed
    formula does not divide alpha by the window size; the code its authors ran does, and so does torch. The printed
    formula is therefore ``alpha=5e-4`` here, and what actually ran is ``alpha=1e-4``.

    Args:
        x: ``(N, C, H, W)``, any floating dtype. Squares are taken in float32 at least (a float16 square overflows
            from 256 up), also under autocast.
        size: number of adjacent channels summed over, at least 1.

    Returns:
        The shape and dtype of ``x``.
    """
    with torch.autocast(x.device.type, enabled=False):
        if not torch.compiler.is_compiling():
            return _LocalResponseNorm.apply(x, size, alpha, beta, k)
        # A compiler or exporter gets the plain formula, which it differentiates and fuses itself.
        wide = _at_least_float32(x)
        return (wide * _power(_denominator(wide, size, alpha, k), -beta)).to(x.dtype)


class _LocalResponseNorm(torch.autograd.Function):
    """The gradient in closed form: autograd's own would keep, and pass over, a tensor for every step of the formula.

    With d the denominator: ``dL/dx_c = g_c d_c^-beta - 2 alpha beta / size * x_c * sum of g_j x_j d_j^(-beta-1)``,
    summed over the channels j that c is in the window of. Only x is kept; d is worked out again. On a CPU a few images
    at a time, so that everything between x and the result stays in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = size, alpha, beta, k
        result = torch.empty_like(x)
        for images, normed in _in_parts(x, result):
            wide = _at_least_float32(images)
            normed.copy_(_power(_denominator(wide, size, alpha, k), -beta).mul_(wide))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.constants
        result = torch.empty_like(x)
        for images, incoming, outgoing in _in_parts(x, gradient, result):
            wide = _at_least_float32(images)
            denominator = _denominator(wide, size, alpha, k)
            direct = _power(denominator, -beta).mul_(incoming)
            through_window = _window_sum((direct * wide).div_(denominator), before=(size - 1) // 2, after=size // 2)
            outgoing.copy_(direct.addcmul_(wide, through_window, value=-2 * alpha * beta / size))
        return result, None, None, None, None


PART = 2**18
"""Values that are worked on at a time on a CPU: with all that is between, about a megabyte a step."""


def _in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape ``(N, …)``, the same few images of each at a time; all at once where N is 0 or on a GPU."""
    count = len(tensors[0])
    images = count if tensors[0].device.type != "cpu" else max(1, PART * count // max(1, tensors[0].numel()))
    return zip(*(tensor.split(max(1, images)) for tensor in tensors), strict=True)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _denominator(wide: Tensor, size: int, alpha: float, k: float) -> Tensor:
    return _window_sum(wide.square(), before=size // 2, after=(size - 1) // 2) * (alpha / size) + k


def _power(denominator: Tensor, exponent: float) -> Tensor:
    """``denominator ** exponent``; the paper's exponent by square roots, several times faster than a general power."""
    if exponent != -0.75:
        return denominator.pow(exponent)
    root = denominator.rsqrt()
    return root.sqrt() * root


def _window_sum(values: Tensor, before: int, after: int) -> Tensor:
    """For each channel the sum over it, ``before`` channels before it and ``after`` behind it: ``(N, C, H, W)``."""
    channels = values.shape[1]
    padded = F.pad(values, (0, 0, 0, 0, before, after))
    total = padded.narrow(1, 0, channels)
    for shift in range(1, before + after + 1):
        shifted = padded.narrow(1, shift, channels)
        total = total + shifted if shift == 1 else total.add_(shifted)
    return total


class LocalResponseNorm(nn.Module):
    """:func:`local_response_norm` as a layer; the defaults are what the 2012 network ran with.

    Args:
        num_features: channels of the input. LRN has no parameters, so this is here only to make the layer
            interchangeable with ``nn.BatchNorm2d``.

    Raises:
        ConfigError: ``size`` below 1, or ``k`` not positive (the denominator could be 0).
    """

    def __init__(self, num_features: int, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0):
        super().__init__()
        if size < 1:
            raise ConfigError(f"LRN size={size} must be at least 1 channel.")
        if k <= 0:
            raise ConfigError(f"LRN k={k} must be positive.")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        return local_response_norm(x, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class OverlappingMaxPool2d(nn.MaxPool2d):
    """Windows of 3 at a stride of 2: the paper's overlapping pooling (section 3.4, z = 3, s = 2)."""

    def __init__(self, padding: int = 0):
        super().__init__(kernel_size=3, stride=2, padding=padding)


class NonOverlappingMaxPool2d(nn.Module):
    """Windows of 2 at a stride of 2 (z = s = 2), with the output size of :class:`OverlappingMaxPool2d` for every input.

    Only then does the ablation of section 3.4 change the overlap and nothing else: fc6 keeps its shape and its
    parameter count. Each window is the overlapping one without its last row and column (padding 0) or without its
    first (padding 1).

    Raises:
        ConfigError: ``padding`` is neither 0 nor 1.
    """

    def __init__(self, padding: int = 0):
        super().__init__()
        if padding not in (0, 1):
            raise ConfigError(f"pooling padding={padding} is not possible; it is 0 or 1.")
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == 1:
            return F.max_pool2d(x, kernel_size=2, stride=2, ceil_mode=True)
        # An even map has one row and one column too many for floor((n - 3) / 2) + 1 windows; an odd one does not
        # use its last row and column anyway.
        return F.max_pool2d(x[..., :-1, :-1], kernel_size=2, stride=2)

    def extra_repr(self) -> str:
        return f"kernel_size=2, stride=2, padding={self.padding}"


def pooled_size(size: int, padding: int = 0) -> int:
    """Side in pixels of a square map of side ``size`` after either pooling; below 1 where the map is too small."""
    return (size + 2 * padding - 3) // 2 + 1


def conv_block(
    index: int,
    conv: nn.Conv2d,
    activation: ActivationFactory,
    *,
    norm: NormFactory | None = None,
    norm_placement: str = "after_activation",
    pool: PoolFactory | None = None,
    pool_padding: int = 0,
) -> list[tuple[str, nn.Module]]:
    """The named layers of one convolutional block, in order.

    ``after_activation`` is the paper's order, convolution → activation → norm → pool. ``before_activation`` is the
    CIFAR-10 tutorial's, convolution → norm → pool → activation; ReLU and tanh never decrease, so pooling first gives
    the same result on a quarter of the values.

    Returns:
        Pairs such as ``("conv1", …), ("norm1", …)``, ready for ``nn.Sequential(OrderedDict(…))``.

    Raises:
        ConfigError: unknown ``norm_placement``.
    """
    if norm_placement not in NORM_PLACEMENTS:
        raise ConfigError(f"norm_placement={norm_placement} does not exist; it is {' or '.join(NORM_PLACEMENTS)}.")
    act = (f"act{index}", activation())
    normed = [] if norm is None else [(f"norm{index}", norm(conv.out_channels))]
    pooled = [] if pool is None else [(f"pool{index}", pool(pool_padding))]
    rest = [*normed, *pooled, act] if norm_placement == "before_activation" else [act, *normed, *pooled]
    return [(f"conv{index}", conv), *rest]


def check_sizes(network: str, image_size: int, smallest: int, **widths: int | list[int]) -> None:
    """Refuse an input side below ``smallest`` pixels and layer widths below 1, naming the value.

    Raises:
        ConfigError: with the setting, its value and what is allowed.
    """
    for name, value in widths.items():
        for width in value if isinstance(value, list) else [value]:
            if not isinstance(width, int) or width < 1:
                raise ConfigError(f"{network} {name}={value}: {width} is not possible, a width is a whole number ≥ 1.")
    if image_size < smallest:
        raise ConfigError(
            f"image_size={image_size} is too small for {network}: the smallest that works is {smallest} "
            f"(data.image_size={smallest})."
        )
