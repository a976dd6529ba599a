"""Checks of network arguments: each raises a ConfigError that names the config key and the valid range."""

import difflib
from collections.abc import Collection, Sequence

from alexnet_pl.runtime.errors import invalid_value


def check_whole(name: str, value: object, lowest: int = 1, highest: int | None = None) -> None:
    """Check that ``value`` is a whole number in ``[lowest, highest]``.

    Raises:
        ConfigError: out of range or of another type.
    """
    if type(value) is not int or value < lowest or (highest is not None and value > highest):
        limits = f"≥ {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise invalid_value(f"model.{name}", value, f"a whole number {limits}")


def check_widths(name: str, widths: Sequence[int], count: int) -> list[int]:
    """Return ``widths`` as a list of ``count`` whole numbers, each at least 1.

    Raises:
        ConfigError: another count, or a width out of range.
    """
    found = list(widths)
    if len(found) != count or any(type(width) is not int or width < 1 for width in found):
        raise invalid_value(f"model.{name}", found, f"{count} whole numbers ≥ 1")
    return found


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ConfigError: it is not; the nearest choice is suggested.
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"Did you mean {near[0]}?" if near else ""
        raise invalid_value(f"model.{name}", value, f"one of: {', '.join(choices)}", hint)


def check_image_size(network: str, image_size: int, smallest: int) -> None:
    """Check that a square input of side ``image_size`` survives all downsampling of ``network``.

    Raises:
        ConfigError: below ``smallest`` pixels.
    """
    if type(image_size) is not int or image_size < smallest:
        fix = f"Set data.image_size={smallest} or more, or choose another network."
        raise invalid_value("model.image_size", image_size, f"{smallest} pixels or more for {network}", fix)
