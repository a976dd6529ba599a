"""Private functions of torch that the config package calls: an upgrade that removes one fails here by its name."""

import torch

from alexnet_pl.config.torch_internals import allocates, has_bf16_instructions


def test_torch_reports_avx512_bf16_support():
    assert torch.cpu._is_avx512_bf16_supported() in (True, False)


def test_torch_reports_amx_tile_support():
    assert torch.cpu._is_amx_tile_supported() in (True, False)


def test_mkldnn_reports_bf16_support():
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (True, False)


def test_bf16_instructions_are_a_plain_bool():
    assert has_bf16_instructions() in (True, False)


def test_schemas_of_operators_tell_new_memory_from_views():
    aten = torch.ops.aten
    assert aten.relu.default._schema.returns[0].alias_info is None
    assert [allocates(each) for each in (aten.relu.default, aten.t.default, aten.relu_.default)] == [True, False, False]
