"""Max pooling that is faster than torch's on a CPU and returns the same values and gradients, bit for bit."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

Window = tuple[int, int, int, bool]
"""Kernel size, stride, padding and ceil_mode, the same for both sides."""


def is_recorded() -> bool:
    """Return True while a compiler or tracer records operations, which then should be torch's plain ones."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


@torch.fx.wrap  # symbolic tracing records one call instead of tracing into the autograd function
def max_pool2d(x: Tensor, kernel_size: int, stride: int, padding: int = 0, ceil_mode: bool = False) -> Tensor:
    """Pool ``(N, C, H, W)`` as :func:`torch.nn.functional.max_pool2d` does.

    On a CPU torch vectorizes over channels if they are contiguous, and not at all otherwise: 8.6 ms for 128×96×11×11 on
    one core against 0.9 ms (and 0.4 ms for the change of format). Contiguous feature maps are therefore pooled in
    channels_last. Their gradient is computed in their own format, because the layers before compute other roundings
    in another one.
    """
    if is_recorded():
        return F.max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode)
    if x.device.type != "cpu" or x.ndim != 4 or not x.is_contiguous() or x.numel() == 0:
        return F.max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode)
    pooled: Tensor = _MaxPool2d.apply(x, (kernel_size, stride, padding, ceil_mode))[0]
    return pooled


class _MaxPool2d(torch.autograd.Function):
    """Maxima and the positions that they were found at; the gradient goes to these positions."""

    @staticmethod
    def forward(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        kernel_size, stride, padding, ceil_mode = window
        by_channel = x.contiguous(memory_format=torch.channels_last)
        sides = [kernel_size] * 2, [stride] * 2, [padding] * 2
        pooled, positions = F.max_pool2d_with_indices(by_channel, *sides, ceil_mode=ceil_mode)
        return pooled.contiguous(), positions.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        (x, ctx.window), (_, positions) = inputs, output
        ctx.mark_non_differentiable(positions)
        ctx.set_materialize_grads(False)  # no zeros for the positions, which have no gradient
        ctx.save_for_backward(x, positions)
        ctx.save_for_forward(positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if gradient is None:
            return None, None
        x, positions = ctx.saved_tensors
        kernel_size, stride, padding, ceil_mode = ctx.window
        sides = [kernel_size] * 2, [stride] * 2, [padding] * 2, [1, 1]
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return backward(gradient.contiguous(), x, *sides, ceil_mode, positions), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if tangent is None:
            return None, None
        (positions,) = ctx.saved_tensors
        return tangent.flatten(2).gather(2, positions.flatten(2)).view_as(positions), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], x: Tensor, window: Window) -> tuple[tuple[Tensor, Tensor], Any]:
        images = x.movedim(in_dims[0], 0)  # (B, N, C, H, W): one batch of B * N images
        results = _MaxPool2d.apply(images.flatten(0, 1).contiguous(), window)
        pooled, positions = (result.unflatten(0, images.shape[:2]) for result in results)
        return (pooled, positions), (0, 0)
