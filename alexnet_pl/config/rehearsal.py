"""Rehearsal of an untrusted network on the meta device: its sizes are known before any memory is allocated."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hydra.errors import InstantiationException
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.config.torch_internals import allocates
from alexnet_pl.config.trust import names_trusted
from alexnet_pl.runtime.errors import ConfigError, invalid_value, one_line

MAX_SIDE = 4096
"""Largest image side in pixels that a foreign config may ask for."""

MAX_OPERATIONS = 10_000
"""Operations on tensors to build a network, and for an image to pass through it; DenseNet-201 takes 3,017 and 914."""

MAX_WEIGHT_BYTES = 4 * 2**30
"""Size of the parameters, together with what their initialization allocates; that of AlexNet is 0.25 GiB."""

MAX_RATIO, MAX_TOTAL_RATIO = 64, 4096
"""Size of one feature map and of all together, in multiples of the image's three channels; VGG-16 takes 21 and 112."""

SMALLEST_LIMIT, LARGEST_LIMIT = 2**20, 2**28
"""Bounds of the limit on one feature map, in values: 4 MiB and 1 GiB in float32, however small or large the image."""


class Budget(TorchDispatchMode):
    """Limit on the tensors that the operations in the block create.

    Args:
        name: subject of the message.
        hint: end of the message.
        largest: bytes of one tensor.
        total: bytes of all tensors.

    Raises:
        ConfigError: a limit is exceeded. On the meta device, where tensors have no memory, nothing has been allocated.
    """

    def __init__(self, name: str, hint: str, largest: int, total: int):
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.name, self.hint, self.largest, self.total = name, hint, largest, total
        self.left, self.operations = total, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operations += 1
        if self.operations > MAX_OPERATIONS:
            raise ConfigError(f"{self.name} is refused: it takes more than {MAX_OPERATIONS:,} operations.{self.hint}")
        out = func(*args, **(kwargs or {}))
        created = [value for value in (out if isinstance(out, tuple | list) else [out]) if isinstance(value, Tensor)]
        if allocates(func):
            for size in (value.numel() * value.element_size() for value in created):
                self.left -= size
                if size > self.largest or self.left < 0:
                    raise ConfigError(
                        f"{self.name} is refused: a tensor has {size / 2**20:,.0f} MiB. Expected at most "
                        f"{self.largest // 2**20:,} MiB, and {self.total // 2**20:,} MiB for all together.{self.hint}"
                    )
        return out


def rehearse(model: Mapping[str, Any], image_size: Any, trust: Sequence[str] = ()) -> nn.Module | None:
    """Build an untrusted network on the meta device and pass one image through it, within limits on what it creates.

    The config must have passed :func:`~alexnet_pl.config.trust.check_targets`.

    Args:
        model: section of the config.
        image_size: side of the input in pixels.

    Returns:
        The network on the meta device; None if the section names a class that the user trusts, which need not support
        that device.

    Raises:
        ConfigError: the image or the network is too large, or they do not fit.
    """
    check_side("data.image_size", image_size)
    if names_trusted({"model": model}, trust):
        return None
    values = 3 * image_size**2
    largest = 4 * min(max(MAX_RATIO * values, SMALLEST_LIMIT), LARGEST_LIMIT)
    total = 4 * max(MAX_TOTAL_RATIO * values, SMALLEST_LIMIT * MAX_TOTAL_RATIO // MAX_RATIO)
    target = model.get("_target_")
    hint = f" If you trust it: --trust {target}, for train trust=[{target}]"
    with torch.device("meta"), torch.no_grad():
        with Budget("model", hint, MAX_WEIGHT_BYTES, MAX_WEIGHT_BYTES), _bare_errors():
            net = instantiate(dict(model))
        if not isinstance(net, nn.Module):
            raise ConfigError(f"model._target_={target} is invalid: expected a network class.")
        image = torch.empty(1, 3, image_size, image_size)
        try:
            with Budget(f"model, for an image of {image_size}×{image_size},", hint, largest, total):
                net.train(False)(image)
        except ConfigError:
            raise
        except Exception as error:  # networks raise anything for a shape that they do not fit
            raise ConfigError(
                f"model is invalid for an image of {image_size}×{image_size}: {one_line(error)[:200]}"
            ) from error
    return net


def check_side(key: str, side: Any) -> None:
    """Check the side of an image in a foreign config.

    Raises:
        ConfigError: it is not a whole number from 1 to ``MAX_SIDE`` pixels.
    """
    if type(side) is not int or not 1 <= side <= MAX_SIDE:
        raise invalid_value(key, side, f"an integer from 1 to {MAX_SIDE}")


@contextmanager
def _bare_errors() -> Iterator[None]:
    """Raise the ConfigError itself that ``instantiate`` wraps into its own exception."""
    try:
        yield
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise
