"""Layers that AlexNet is composed of, and the factory types that make them interchangeable.

A network takes three factories and calls them wherever it needs a layer, so a variant differs in a factory only:

- ``norm(channels)``: normalization of ``(N, channels, H, W)`` feature maps (``conf/model/norm``);
- ``pool(padding)``: max pooling with stride 2 (``conf/model/pool``);
- ``activation()``: elementwise nonlinearity (``conf/model/activation``).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_pl.models.checks import check_choice, check_whole
from alexnet_pl.models.pooling import is_recorded, max_pool2d
from alexnet_pl.runtime.errors import invalid_value

NormFactory = Callable[[int], nn.Module]

PoolFactory = Callable[[int], nn.Module]

ActivationFactory = Callable[[], nn.Module]

NORM_PLACEMENTS = ("before_activation", "after_activation")


class BlockOptions(TypedDict, total=False):
    """Keyword arguments of :func:`conv_block`, for networks that share them between blocks."""

    norm: NormFactory
    norm_placement: str
    pool: PoolFactory
    pool_padding: int


@torch.fx.wrap  # symbolic tracing records one call instead of tracing into the autograd function
def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Normalize each value by the squares of its neighbors in adjacent channels (paper, section 3.3).

    ``y_c = x_c / (k + alpha / size * sum of x_j^2 over the size channels around c) ** beta``, the convention of
    :class:`torch.nn.LocalResponseNorm` and of the authors' code. The formula as printed in the paper does not divide
    alpha by the window size, so it is ``alpha=5e-4`` here; the network actually ran with ``alpha=1e-4``.

    Args:
        x: ``(N, C, ...)`` with at least three dimensions, any floating dtype. Squares are taken in float32 at least,
            also under autocast, because float16 overflows from 256² on.
        size: number of adjacent channels to sum over, at least 1.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: ``x`` has fewer than three dimensions.
    """
    if x.ndim < 3:
        raise ValueError(f"local_response_norm expects (N, C, ...) with at least three dimensions, got {x.ndim}.")
    with torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False):
        if is_recorded():  # a compiler differentiates and fuses the plain formula by itself
            return _formula(x, size, alpha, beta, k)
        keeps = x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled()
        result: Tensor = _LocalResponseNorm.apply(x, keeps, size, alpha, beta, k)[0]
        return result


class _LocalResponseNorm(torch.autograd.Function):
    """Closed-form gradient; autograd would keep a tensor for every step of the formula.

    With denominator d: ``dL/dx_c = g_c d_c^-beta - 2 alpha beta / size * x_c * sum of g_j x_j d_j^(-beta-1)``, summed
    over the channels j whose window contains c. Forward and backward work on a few images at a time in memory that they
    reuse, so that on a CPU the intermediate values stay in the cache.

    ``keeps`` makes the forward pass return d and d^-beta as well, in float32 at least, and the backward pass use them:
    a third less time on a CPU. Without it the backward pass computes them again, since a GPU's memory is the scarcer.
    """

    @staticmethod
    def forward(x: Tensor, keeps: bool, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, ...]:
        scratch = _Scratch(x, size, k)
        results = torch.empty_like(x), *(torch.empty_like(x, dtype=scratch.dtype) for _ in range(2 * keeps))
        for images, normalized, *kept in scratch.parts(x, *results):
            wide = _at_least_float32(images)
            denominator = scratch.denominator(wide, alpha, out=kept[0] if kept else None)
            factor = scratch.power(denominator, -beta, out=kept[1] if kept else None)
            torch.mul(factor, wide, out=normalized)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, *constants = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
        ctx.save_for_backward(x, *output[1:])
        ctx.save_for_forward(x, *output[1:])
        ctx.constants = constants

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        rest = (None, None, None, None, None)
        if gradient is None:
            return None, *rest
        x, *kept = ctx.saved_tensors
        # Grad mode is on for create_graph=True and in torch.func, where the gradient is differentiated in turn.
        if not torch.is_grad_enabled():
            try:
                return _fast_gradient(x, kept, gradient, *ctx.constants), *rest
            except RuntimeError:  # is_grads_batched=True maps over gradients, which forbids in-place operations
                pass
        return _gradient_formula(x, gradient, *ctx.constants), *rest

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        if tangent is None:
            return None, *(None for _ in kept)
        size, alpha, beta, k = ctx.constants
        wide, direction = _at_least_float32(x), _at_least_float32(tangent)
        denominator = _denominator(wide, size, alpha, k)
        through_window = _window_sum(wide * direction, before=size // 2, after=(size - 1) // 2) / denominator
        change = direction - (2 * alpha * beta / size) * wide * through_window
        result: Tensor = _power(denominator, -beta) * change
        return result.to(x.dtype), *(None for _ in kept)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], x: Tensor, *constants: Any) -> tuple[tuple[Tensor, ...], Any]:
        images = x.movedim(in_dims[0], 0)  # (B, N, C, ...): one batch of B * N images
        results = _LocalResponseNorm.apply(images.flatten(0, 1), *constants)
        return tuple(result.view_as(images) for result in results), (0,) * len(results)


def _fast_gradient(
    x: Tensor, kept: list[Tensor], gradient: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    """Return :func:`_gradient_formula` computed in place and by parts.

    Args:
        kept: the denominators and their powers of ``-beta``; [] to compute them.
    """
    result = torch.empty_like(x)
    scratch = _Scratch(x, size, k)
    for images, incoming, outgoing, *saved in scratch.parts(x, gradient, result, *kept):
        wide = _at_least_float32(images)
        denominator = saved[0] if saved else scratch.denominator(wide, alpha)
        factor = saved[1] if saved else scratch.power(denominator, -beta)
        direct = torch.mul(factor, incoming, out=scratch.factor)
        through_window = scratch.sum_of_quotients(direct, wide, denominator)
        torch.addcmul(direct, wide, through_window, value=-2 * alpha * beta / size, out=outgoing)
    return result


def _formula(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    wide = _at_least_float32(x)
    return (wide * _power(_denominator(wide, size, alpha, k), -beta)).to(x.dtype)


def _gradient_formula(x: Tensor, gradient: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Return the gradient with respect to ``x`` by differentiable operations."""
    wide = _at_least_float32(x)
    denominator = _denominator(wide, size, alpha, k)
    direct = _power(denominator, -beta) * gradient
    through_window = _window_sum(direct * wide / denominator, before=(size - 1) // 2, after=size // 2)
    return (direct - (2 * alpha * beta / size) * wide * through_window).to(x.dtype)


PARTS = {"cpu": 2**17}
"""Values per part and thread by device type: half a megabyte per tensor on a CPU. ``DEFAULT_PART`` for other types."""

DEFAULT_PART = 2**25


class _Scratch:
    """Memory for the intermediate values of a few images, reused for the next ones.

    Every operation writes into it, because an LRN is bound by memory traffic: allocating each intermediate value takes
    as long as computing it. Sums over windows add neighbors, then neighbors of neighbors, three additions for five
    channels. The constant k enters as k / size per channel of a window, padding included.

    Args:
        x: the whole input ``(N, C, ...)``.
        size: channels per window.
        k: constant of the denominator.
    """

    SQUARES, PRODUCTS, SUM, FACTOR = 0, 1, 4, 5  # buffers; 2 and 3 hold sums of pairs

    def __init__(self, x: Tensor, size: int, k: float):
        self.size, self.channels = size, x.shape[1]
        threads = torch.get_num_threads() if x.device.type in PARTS else 1
        parts = max(1, round(x.numel() / threads / PARTS.get(x.device.type, DEFAULT_PART)))
        parts = next((n for n in range(parts, 2 * parts) if len(x) % n == 0), parts)  # equal ones share their views
        self.images = max(1, -(-len(x) // parts))
        self._shape = (min(self.images, len(x)), self.channels + size - 1, *x.shape[2:])
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self._memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        self.share, self.count = x.new_full((), k / size, dtype=self.dtype), 0
        self._padding = {self.SQUARES: (size // 2, k / size), self.PRODUCTS: ((size - 1) // 2, 0.0)}
        self._buffers: dict[int, Tensor] = {}
        self._views: dict[tuple[int, int, int | None, int], Tensor] = {}

    def parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Split tensors of one shape ``(N, ...)`` into the same few images of each."""
        for parts in zip(*(tensor.split(self.images) for tensor in tensors), strict=True):
            self.count = len(parts[0])
            yield parts

    def _get(self, index: int, channels: int | None = None, start: int = 0) -> Tensor:
        """Return channels of a buffer for the images of the current part, by default as many as the input has."""
        key = (self.count, index, channels, start)
        if (view := self._views.get(key)) is None:  # making a view takes as long as computing a hundred values
            if index not in self._buffers:
                self._buffers[index] = self._allocate(index)
            buffer = self._buffers[index]
            if self.count < len(buffer):
                buffer = buffer[: self.count]
            view = self._views[key] = buffer.narrow(1, start, self.channels if channels is None else channels)
        return view

    def _allocate(self, index: int) -> Tensor:
        """Return a new buffer with its padding, the channels in front of and behind the values, filled in."""
        buffer = torch.empty(self._shape, dtype=self.dtype, device=self.share.device, memory_format=self._memory_format)
        if index in self._padding:
            before, value = self._padding[index]
            buffer[:, :before] = value
            buffer[:, before + self.channels :] = value
        return buffer

    @property
    def factor(self) -> Tensor:
        """Memory for a value per value of the current part, which :meth:`power` writes to."""
        return self._get(self.FACTOR)

    def denominator(self, wide: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
        """Return ``k + alpha / size * (sum of squares over each window)``, in ``out`` if it is given."""
        squares = self._get(self.SQUARES, start=self.size // 2)
        torch.addcmul(self.share, wide, wide, value=alpha / self.size, out=squares)
        total = self._window_sum(self.SQUARES, out)
        return total if out is None or total is out else out.copy_(total)

    def power(self, denominator: Tensor, exponent: float, out: Tensor | None = None) -> Tensor:
        """Return ``denominator ** exponent``, in ``out`` if it is given; see :func:`_power`."""
        result = self.factor if out is None else out
        if exponent != -0.75:
            return torch.pow(denominator, exponent, out=result)
        root = torch.sqrt(
            torch.rsqrt(denominator, out=result), out=self._get(self.PRODUCTS, start=(self.size - 1) // 2)
        )
        return result.mul_(root)

    def sum_of_quotients(self, direct: Tensor, wide: Tensor, denominator: Tensor) -> Tensor:
        """Return ``direct * wide / denominator`` summed over the channels whose window contains each channel."""
        products = self._get(self.PRODUCTS, start=(self.size - 1) // 2)  # between zeros
        torch.mul(direct, wide, out=products).div_(denominator)
        return self._window_sum(self.PRODUCTS)

    def _window_sum(self, index: int, out: Tensor | None = None) -> Tensor:
        """Return the sums of ``size`` consecutive channels of a buffer, in a buffer or in ``out``.

        The size is split into powers of two. Sums of 2, 4, … channels each come from those before by one addition.
        """
        current, width, done = index, 1, 0
        total: Tensor | None = None
        while True:
            if self.size & width:
                part = self._get(current, start=done)
                done += width
                if total is not None:
                    total = torch.add(total, part, out=self._get(self.SUM) if out is None else out)
                else:  # a sum that is not complete may not stay in a buffer that is about to be overwritten
                    total = part if done == self.size or current == index else self._get(self.SUM).copy_(part)
            if done == self.size:
                assert total is not None  # a size is at least 1
                return total
            length, following = self.channels + self.size - 2 * width, 2 if current != 2 else 3
            pair = self._get(current, length), self._get(current, length, width)
            torch.add(*pair, out=self._get(following, length))
            current, width = following, 2 * width


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _denominator(wide: Tensor, size: int, alpha: float, k: float) -> Tensor:
    return _window_sum(wide.square(), before=size // 2, after=(size - 1) // 2) * (alpha / size) + k


def _power(denominator: Tensor, exponent: float) -> Tensor:
    """Return ``denominator ** exponent``; square roots are several times faster for the paper's exponent."""
    if exponent != -0.75:
        return denominator.pow(exponent)
    root = denominator.rsqrt()
    return root.sqrt() * root


def _window_sum(values: Tensor, before: int, after: int) -> Tensor:
    """Sum each channel of ``(N, C, ...)`` with the ``before`` channels in front of it and the ``after`` behind it."""
    channels = values.shape[1]
    padded = F.pad(values, (*(0, 0) * (values.ndim - 2), before, after))
    total = padded.narrow(1, 0, channels)
    for shift in range(1, before + after + 1):
        shifted = padded.narrow(1, shift, channels)
        total = total + shifted if shift == 1 else total.add_(shifted)
    return total


class LocalResponseNorm(nn.Module):
    """Apply :func:`local_response_norm` as a layer; the defaults are the constants of the 2012 network.

    Args:
        num_features: channels of the input; unused without ``groups``, because LRN has no parameters, but makes the
            layer interchangeable with ``nn.BatchNorm2d``.
        size: number of adjacent channels to sum over, at least 1.
        alpha: finite, at least 0; divided by ``size``.
        beta: finite, at least 0.
        k: finite, above 0, so that the denominator is never 0.
        groups: parts of the channels that are normalized separately, a divisor of ``num_features``. The network of
            2012 has 2, one per GPU, so that no window reaches from one tower into the other.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        num_features: int,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        groups: int = 1,
    ):
        super().__init__()
        check_response_norm(size, alpha, beta, k)
        check_whole("norm.groups", groups)
        if num_features % groups:
            raise invalid_value("model.norm.groups", groups, f"a divisor of the {num_features} feature maps")
        self.size, self.alpha, self.beta, self.k, self.groups = size, alpha, beta, k, groups

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``(N, C, ...)``, in the shape and dtype of ``x``."""
        constants = (self.size, self.alpha, self.beta, self.k)
        if self.groups == 1:
            return local_response_norm(x, *constants)
        return torch.cat([local_response_norm(part, *constants) for part in x.chunk(self.groups, dim=1)], dim=1)

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.groups != 1 else ""
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}{groups}"


class SpatialResponseNorm(nn.Module):
    """Normalize each value by the squares around it in its own feature map, cuda-convnet's ``rnorm``.

    ``y = x / (k + alpha / size**2 * sum of x_j^2 over the size × size pixels around x) ** beta``. Pixels beyond the
    border count as 0, and alpha is divided by ``size**2`` there too. The network of 2012 has one after block 2 (size 5,
    alpha 0.001, called ``cnorm2``), cuda-convnet's ``layers-18pct`` two (size 3, alpha 5e-5).

    Args:
        num_features: channels of the input; unused, as in :class:`LocalResponseNorm`.
        size: side of the window in pixels, at least 1.
        alpha, beta: finite, at least 0.
        k: finite, above 0; 1 in the authors' code.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, num_features: int, size: int = 3, alpha: float = 5e-5, beta: float = 0.75, k: float = 1.0):
        super().__init__()
        check_response_norm(size, alpha, beta, k)
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized ``(N, C, H, W)``, in the dtype of ``x``; squares are taken in float32 at least."""
        with torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False):
            wide = _at_least_float32(x)
            before, after = self.size // 2, (self.size - 1) // 2
            squares = F.pad(wide.square(), (before, after, before, after))
            denominator = F.avg_pool2d(squares, self.size, stride=1) * self.alpha + self.k
            return (wide * _power(denominator, -self.beta)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


def check_response_norm(size: int, alpha: float, beta: float, k: float) -> None:
    """Check the constants of a response normalization.

    Raises:
        ConfigError: a window below 1, an infinite or negative ``alpha`` or ``beta``, a ``k`` that is not above 0.
    """
    check_whole("norm.size", size)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value < math.inf:
            raise invalid_value(f"model.norm.{name}", value, "a number ≥ 0")
    if not 0 < k < math.inf:
        raise invalid_value("model.norm.k", k, "a number above 0")


class LocallyConnected2d(nn.Module):
    """Convolution whose weights are not shared: every output pixel has filters and biases of its own.

    This is cuda-convnet's ``local`` layer, with stride 1. Weights are ``(pixels, out_channels, kernel_size**2 *
    in_channels)`` and biases ``(pixels, out_channels)``, with the pixels of output and filter in row-major order; both
    start like those of ``nn.Linear``.

    Args:
        in_channels, out_channels: feature maps of the input and output.
        size: side of the square input in pixels, from which the number of weights follows.
        kernel_size: side of the filters in pixels.
        padding: zeros on every side of the input.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, kernel_size: int = 3, padding: int = 1):
        super().__init__()
        self.in_channels, self.out_channels, self.size = in_channels, out_channels, size
        self.kernel_size, self.padding = kernel_size, padding
        self.out_size = size + 2 * padding - kernel_size + 1
        inputs = in_channels * kernel_size**2
        self.weight = nn.Parameter(torch.empty(self.out_size**2, out_channels, inputs))
        self.bias = nn.Parameter(torch.empty(self.out_size**2, out_channels))
        with torch.no_grad():
            for values in (self.weight, self.bias):
                values.uniform_(-(inputs**-0.5), inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, out_channels, out_size, out_size)`` for ``(N, in_channels, size, size)``."""
        # Copying whole pixels, channels last, takes half the time of F.unfold.
        padded = F.pad(x.permute(2, 3, 0, 1), (0, 0, 0, 0, *[self.padding] * 4))
        side, offsets = self.out_size, range(self.kernel_size)
        columns = torch.cat([padded[i : i + side, j : j + side] for i in offsets for j in offsets], -1).flatten(0, 1)
        pixels = torch.baddbmm(self.bias.unsqueeze(1), columns, self.weight.transpose(1, 2))
        return pixels.view(side, side, -1, self.out_channels).permute(2, 3, 0, 1).contiguous()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, size={self.size}, kernel_size={self.kernel_size}, "
            f"padding={self.padding}"
        )


class UnscaledDropout(nn.Dropout):
    """Dropout that scales in evaluation instead of in training (paper, section 4.2).

    Training sets units to 0 and leaves the others as they are; evaluation multiplies all by ``1 - p``. Torch's layer
    divides by ``1 - p`` in training instead, which doubles the input of the next layer at ``p = 0.5``: the same family
    of functions, at another initialization and step size.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = super().forward(x)
        return dropped * (1 - self.p)


class OverlappingMaxPool2d(nn.MaxPool2d):
    """Max pooling over 3×3 windows with stride 2, so that windows overlap (paper, section 3.4: z = 3, s = 2)."""

    def __init__(self, padding: int = 0):
        super().__init__(kernel_size=3, stride=2, padding=padding)
        self.size = 3, 2, padding

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima ``(N, C, H', W')`` of ``(N, C, H, W)``, with H' and W' by :func:`pooled_size`."""
        return max_pool2d(x, *self.size)


class NonOverlappingMaxPool2d(nn.Module):
    """Max pooling over 2×2 windows with stride 2 and the output size of :class:`OverlappingMaxPool2d`.

    Equal output sizes make the ablation of section 3.4 change the overlap and nothing else: fc6 keeps its shape and
    parameter count. Each window is the overlapping one without its last row and column (padding 0) or without its
    first ones (padding 1).

    Raises:
        ConfigError: ``padding`` is neither 0 nor 1.
    """

    def __init__(self, padding: int = 0):
        super().__init__()
        check_whole("pool.padding", padding, lowest=0, highest=1)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima ``(N, C, H', W')`` of ``(N, C, H, W)``, with H' and W' by :func:`pooled_size`."""
        if self.padding == 1:
            return max_pool2d(x, kernel_size=2, stride=2, ceil_mode=True)
        # An even side has one row too many for floor((n - 3) / 2) + 1 windows; an odd one ignores its last row anyway.
        return F.max_pool2d(x[..., :-1, :-1], kernel_size=2, stride=2)

    def extra_repr(self) -> str:
        return f"kernel_size=2, stride=2, padding={self.padding}"


def pooled_size(size: int, padding: int = 0, ceil: bool = False) -> int:
    """Return the side in pixels of a square feature map of side ``size`` after pooling; below 1 if it is too small.

    Args:
        ceil: round up, so that a last window counts that is partly outside, as in the authors' code.
    """
    return (size + 2 * padding - 3 + ceil) // 2 + 1


def conv_block(
    index: int,
    conv: nn.Conv2d,
    activation: ActivationFactory,
    *,
    norm: NormFactory | None = None,
    second_norm: NormFactory | None = None,
    norm_placement: str = "after_activation",
    pool: PoolFactory | None = None,
    pool_padding: int = 0,
) -> list[tuple[str, nn.Module]]:
    """Return the named layers of one convolutional block, in order.

    ``after_activation`` is the order in the paper's text, convolution → activation → norm → pool. ``before_activation``
    is the CIFAR-10 tutorial's, convolution → norm → pool → activation. ReLU and tanh are monotonic, so pooling first
    gives the same result on a quarter of the values.

    Args:
        index: number of the block, the suffix of its layers' names.
        conv: the convolution; its output channels size the norm layer.
        norm, second_norm, pool: None leaves out the layer. The second norm layer, ``cnorm<index>``, follows the first.

    Returns:
        Pairs such as ``("conv1", …), ("norm1", …)``, ready for ``nn.Sequential(OrderedDict(…))``.

    Raises:
        ConfigError: unknown ``norm_placement``.
    """
    check_choice("norm_placement", norm_placement, NORM_PLACEMENTS)
    act = (f"act{index}", activation())
    factories = {"norm": norm, "cnorm": second_norm}
    norms = [(f"{name}{index}", make(conv.out_channels)) for name, make in factories.items() if make is not None]
    pools = [] if pool is None else [(f"pool{index}", pool(pool_padding))]
    rest = [*norms, *pools, act] if norm_placement == "before_activation" else [act, *norms, *pools]
    return [(f"conv{index}", conv), *rest]
