"""Private functions of torch that the config package calls; tests/config/test_torch_internals.py names each."""

from typing import Any

import torch


def has_bf16_instructions() -> bool:
    """Return True if the CPU has bf16 instructions and ``ONEDNN_MAX_CPU_ISA`` does not cap them."""
    on_chip = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(on_chip and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def allocates(operation: Any) -> bool:
    """Return True if an operator of ``torch.ops`` returns new memory, not a view of its input or the input itself."""
    return all(returned.alias_info is None for returned in operation._schema.returns)
