"""Private functions of torch that the config package calls: an upgrade that removes one fails here by its name."""

import torch

from alexnet_pl.config.torch_internals import has_bf16_instructions


def test_torch_reports_avx512_bf16_support():
    assert torch.cpu._is_avx512_bf16_supported() in (True, False)


def test_torch_reports_amx_tile_support():
    assert torch.cpu._is_amx_tile_supported() in (True, False)


def test_mkldnn_reports_bf16_support():
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (True, False)


def test_bf16_instructions_are_a_plain_bool():
    assert has_bf16_instructions() in (True, False)
