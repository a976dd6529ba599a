"""Images in memory move to the device once, if they fit."""

import logging

import torch
from helpers import config
from hydra.utils import instantiate


def test_images_too_large_for_the_gpu_stay_in_host_memory(monkeypatch, caplog):
    data = instantiate(config("data=digits", "model=lenet5").data)
    data.setup()
    loader = data.train_dataloader()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * loader.images.nbytes, 10**9))
    caplog.set_level(logging.INFO, "alexnet_pl")
    data.move_to(torch.device("cuda", 0))
    assert "images stay in host memory" in caplog.text
    assert loader.images.device.type == "cpu"
    assert next(iter(loader))[0].device.type == "cpu"


def test_splits_share_their_images_on_the_device():
    data = instantiate(config("data=digits", "model=lenet5").data)
    data.setup()
    data.move_to(torch.device("meta"))  # the only device besides the CPU that every machine has
    train, val = data.train_dataloader(), data.val_dataloader()
    assert train.images.device.type == "meta"
    assert train.images is val.images
