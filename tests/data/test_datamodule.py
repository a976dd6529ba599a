"""Settings of the data modules, and what happens to batches on their way to the network."""

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import transforms

from alexnet_pl.data.cifar10 import CLASS_NAMES
from alexnet_pl.runtime.errors import ConfigError

from .modules import data_module


def test_digits_are_scikit_learns_in_three_stratified_parts():
    module = data_module("data=digits")
    assert module.counts() == {"train": 1293, "val": 144, "test": 360}
    labels = [part.labels[part.indices] for part in (module.train_dataloader(), module.val_dataloader())]
    for part, size in zip((*labels, module.test_dataloader().labels), (1293, 144, 360), strict=True):
        assert np.abs(np.bincount(part) - size / 10).max() <= 5
    together = torch.cat([*labels, module.test_dataloader().labels])
    assert sorted(together.tolist()) == sorted(load_digits().target.tolist())
    # No seed changes the digits' test set.
    other = data_module("data=digits", "seed=7", "split_seed=7")
    assert torch.equal(other.test_dataloader().images, module.test_dataloader().images)


def test_resizing_and_normalization_match_the_tutorial(class_folders):
    root = class_folders(train_per_class=10)
    module = data_module("data=cifar10", f"data.root={root}", "data.image_size=50")
    images, labels = next(iter(module.test_dataloader()))
    normalized, _ = module.on_after_batch_transfer((images, labels), 0)
    with Image.open(root / "test" / CLASS_NAMES[0] / "0000.png") as image:
        tutorial = transforms.Compose(
            [transforms.Resize((50, 50)), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        )(image)
    assert labels[0] == 0
    assert normalized.dtype == torch.float32
    assert (normalized[0] - tutorial).abs().max() <= 2 / 127.5 + 1e-6  # two gray levels between the filters


class _Probe(LightningModule):
    """Module that keeps the batches of each phase."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_only_training_images_are_augmented(tmp_path):
    def batches(augment):
        module, probe = data_module("data=digits", f"augment={augment}"), _Probe()
        trainer = Trainer(
            max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, num_sanity_val_steps=2, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(probe, datamodule=module)
        trainer.test(probe, datamodule=module, verbose=False)
        return probe.seen

    plain, augmented = batches("none"), batches("crop_flip")
    for phase in ("val", "test"):
        assert len(plain[phase]) == len(augmented[phase]) > 0
        for (a, _), (b, _) in zip(plain[phase], augmented[phase], strict=True):
            assert torch.equal(a, b)
    changed = [not torch.equal(a, b) for (a, _), (b, _) in zip(plain["train"], augmented["train"], strict=True)]
    assert len(changed) == 40
    assert all(changed)
    # Lightning passes the epoch to the sampler, so the second epoch has another order.
    first, second = (torch.cat([labels for _, labels in plain["train"][part]]) for part in (slice(20), slice(20, 40)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("setting", ["data.batch_size=0", "data.val_fraction=0", "data.val_fraction=1.5"])
def test_values_out_of_range_are_named(setting):
    with pytest.raises(Exception, match=f"{setting} is invalid: expected") as refusal:
        data_module("data=digits", setting)
    assert isinstance(refusal.value.__cause__, ConfigError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("data.resize_size=31", "data.resize_size=31 is invalid: expected data.image_size=32 or more, or null"),
        ("data.resize_size=0", "data.resize_size=0 is invalid: expected an integer, 1 or more"),
        ("data.test_crops=10", "data.test_crops=10 is invalid: ten crops need images larger than .*=32.*37"),
        ("data.test_crops=3", "data.test_crops=3 is invalid: expected 1 or one of: 2, 6, 10"),
        ("augment=crop_flip augment.crop.size=30", "at least data.image_size=32 pixels a side, and it leaves 30"),
        ("augment=crop_flip augment.crop.padding=0 augment.crop.size=40", "augment size=40 is invalid: expected at"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_before_data_is_read(settings, message):
    with pytest.raises(Exception, match=message):
        instantiate(config("model=lenet5", *settings.split()).data)


def test_images_are_stored_larger_and_cropped_per_batch(tmp_path):
    """Random crops in training, center crops elsewhere. The trial run of the augmentation draws nothing."""
    torch.manual_seed(4)
    expected_draw = torch.rand(1)
    torch.manual_seed(4)
    module = data_module("data.resize_size=40", "augment=crop_flip", "augment.crop.padding=0", "augment.crop.size=32")
    assert torch.equal(torch.rand(1), expected_draw)
    images = module.val_dataloader().images
    assert images.shape[1:] == (3, 40, 40)
    batch = (images[:50], torch.zeros(50))
    trainer = Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path, accelerator="cpu")
    module.trainer = trainer
    for stage, is_center in [("validating", True), ("testing", True), ("training", False)]:
        setattr(trainer, stage, True)
        cropped = module.on_after_batch_transfer(batch, 0)[0]
        assert cropped.shape == (50, 3, 32, 32)
        assert torch.allclose(cropped, (images[:50, :, 4:36, 4:36] / 255 - 0.5) / 0.5, atol=1e-6) is is_center
    module.augment, trainer.training = torch.nn.Identity(), True
    assert module.on_after_batch_transfer(batch, 0)[0].shape == (50, 3, 32, 32)  # the center without augmentation


def test_some_training_images_are_evenly_spaced_whatever_the_batch_size():
    found = []
    for size in (16, 500):
        data = instantiate(config("model=lenet5", "data=digits", f"data.batch_size={size}").data)
        data.setup()
        found.append(torch.cat([*data.training_images(100)]))
    everything = torch.cat([*data.training_images()])
    assert torch.equal(*found)
    assert torch.equal(found[0], everything[[i * len(everything) // 100 for i in range(100)]])
    assert torch.equal(torch.cat([*data.training_images(10**6)]), everything)
