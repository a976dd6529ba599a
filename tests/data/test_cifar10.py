"""The split, the loader, the sources and what is refused, on real files."""

import pickle
import shutil
from hashlib import md5

import numpy as np
import pytest
import torch
from helpers import config
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import transforms
from torchvision.datasets import CIFAR10

from alexnet_pl.data import cifar10
from alexnet_pl.data.cifar10 import CLASS_NAMES
from alexnet_pl.data.loaders import IGNORE_INDEX, EpochShuffle, TensorLoader
from alexnet_pl.data.splits import stratified_split
from alexnet_pl.runtime.errors import ConfigError, DataError

CIFAR10_LABELS = np.repeat(np.arange(10), 5000)


def data_module(*overrides: str):
    module = instantiate(config("model=lenet5", *overrides).data)
    module.prepare_data()
    module.setup()
    return module


# --- the split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_split_of_cifar10_is_45000_and_500_a_class(order):
    labels = CIFAR10_LABELS if order == "sorted" else np.random.default_rng(0).permutation(CIFAR10_LABELS)
    train, val = stratified_split(labels, 0.1, seed=0)
    assert (len(train), len(val)) == (45_000, 5_000)
    assert np.bincount(labels[val]).tolist() == [500] * 10
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(50_000))


def test_split_depends_on_its_seed_alone_and_stays():
    first, again, other = (stratified_split(CIFAR10_LABELS, 0.1, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    # These very images, on every machine and in every version: a study that spans them compares like with like.
    assert md5(first.astype("<i8").tobytes()).hexdigest() == "497630b93af286ee920df5e24c1583c1"


def test_split_ignores_the_training_seed():
    indices = {
        (seed, split_seed): data_module(f"seed={seed}", f"split_seed={split_seed}").val_dataloader().indices.tolist()
        for seed, split_seed in [(1, 0), (2, 0), (1, 5)]
    }
    assert indices[1, 0] == indices[2, 0] != indices[1, 5]


def test_split_refuses_what_cannot_work():
    with pytest.raises(ConfigError, match="val_fraction=1.0"):
        stratified_split(CIFAR10_LABELS, 1.0, seed=0)
    with pytest.raises(DataError, match="20 images .the smallest class has 2. are too few"):
        stratified_split(np.repeat(np.arange(10), 2), 0.1, seed=0)


# --- the loader -----------------------------------------------------------------------------------------------------


def loader(count: int, batch_size: int, seed: int | None = None) -> TensorLoader:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    sampler = None if seed is None else EpochShuffle(count, seed)
    return TensorLoader(images, torch.arange(count), torch.arange(count), batch_size, sampler)


def labels_of(loader: TensorLoader) -> list[int]:
    return [label for _, labels in loader for label in labels.tolist()]


def test_evaluation_sees_every_image_once_in_order():
    assert [label for label in labels_of(loader(10, 4)) if label != IGNORE_INDEX] == list(range(10))
    assert len(loader(10, 4)) == 3


def test_evaluation_batches_are_filled_up_to_one_size():
    assert [len(images) for images, _ in loader(10, 4)] == [4, 4, 4]
    assert labels_of(loader(10, 4))[-2:] == [IGNORE_INDEX, IGNORE_INDEX]
    assert labels_of(loader(3, 4)) == [0, 1, 2]  # the split is smaller than one batch
    assert labels_of(loader(8, 4)) == [*range(8)]


def test_training_drops_the_incomplete_batch_unless_it_is_the_only_one():
    training = loader(10, 4, seed=1)
    assert [len(labels) for _, labels in training] == [4, 4]
    assert len(training) == 2
    assert sorted(labels_of(loader(3, 4, seed=1))) == [0, 1, 2]
    assert len(loader(3, 4, seed=1)) == 1


def test_images_stay_with_their_labels():
    for images, labels in loader(50, 8, seed=3):
        assert images[:, 0, 0, 0].tolist() == labels.tolist()


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        training = loader(100, 10, seed)
        training.sampler.set_epoch(epoch)
        torch.rand(epoch + 1)  # whatever else is drawn
        return labels_of(training)

    assert order(1, 0) == order(1, 0)
    assert order(1, 3) == order(1, 3)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    assert sorted(order(0, 0)) == list(range(100))


# --- the data module ------------------------------------------------------------------------------------------------


def test_digits_are_the_real_ones_in_three_stratified_parts():
    module = data_module("data=digits")
    assert module.counts() == {"train": 1293, "val": 144, "test": 360}
    labels = [part.labels[part.indices] for part in (module.train_dataloader(), module.val_dataloader())]
    for part, size in zip((*labels, module.test_dataloader().labels), (1293, 144, 360), strict=True):
        assert np.abs(np.bincount(part) - size / 10).max() <= 5
    everything = torch.cat([*labels, module.test_dataloader().labels])
    assert sorted(everything.tolist()) == sorted(load_digits().target.tolist())
    # The digits' test set is nobody's choice: no seed moves it.
    other = data_module("data=digits", "seed=7", "split_seed=7")
    assert torch.equal(other.test_dataloader().images, module.test_dataloader().images)


def test_resizing_and_normalising_are_the_tutorials(class_folders):
    root = class_folders(train_per_class=10)
    module = data_module("data=cifar10", f"data.root={root}", "data.image_size=50")
    images, labels = next(iter(module.test_dataloader()))
    normalised, _ = module.on_after_batch_transfer((images, labels), 0)
    with Image.open(root / "test" / CLASS_NAMES[0] / "0000.png") as image:
        tutorial = transforms.Compose(
            [transforms.Resize((50, 50)), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        )(image)
    assert labels[0] == 0
    assert normalised.dtype == torch.float32
    assert (normalised[0] - tutorial).abs().max() <= 2 / 127.5 + 1e-6  # two grey levels: torch's filter, not PIL's


class _Probe(LightningModule):
    """Keeps the batches it is given, in each phase."""

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
    # Lightning told the sampler which epoch it is: the second one has another order.
    first, second = (torch.cat([labels for _, labels in plain["train"][part]]) for part in (slice(20), slice(20, 40)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("setting", ["data.batch_size=0", "data.val_fraction=0", "data.val_fraction=1.5"])
def test_data_settings_out_of_range_are_named(setting):
    with pytest.raises(Exception, match=setting) as refusal:
        data_module("data=digits", setting)
    assert isinstance(refusal.value.__cause__, ConfigError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("data.resize_size=31", "data.resize_size=31 is below data.image_size=32"),
        ("data.resize_size=0", "data.resize_size=0"),
        ("data.test_crops=10", "data.test_crops=10 needs images larger than data.image_size=32.*37"),
        ("augment=crop_flip augment.size=30", "augment leaves 30 pixels a side, and the network takes data.image_s"),
        ("augment=crop_flip augment.padding=0 augment.size=40", "size=40 does not fit into images of 32×32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_data_is_read(settings, message):
    with pytest.raises(Exception, match=message):
        instantiate(config("model=lenet5", *settings.split()).data)


def test_images_are_kept_larger_and_cut_to_size_batch_by_batch(tmp_path):
    """Training at random, everything else at the centre; what is drawn to try the augmentation is not missed later."""
    torch.manual_seed(4)
    expected_draw = torch.rand(1)
    torch.manual_seed(4)
    module = data_module("data.resize_size=40", "augment=crop_flip", "augment.padding=0", "augment.size=32")
    assert torch.equal(torch.rand(1), expected_draw)
    images = module.val_dataloader().images
    assert images.shape[1:] == (3, 40, 40)
    batch = (images[:50], torch.zeros(50))
    trainer = Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path, accelerator="cpu")
    module.trainer = trainer
    for stage, crop in [("validating", True), ("testing", True), ("training", False)]:
        setattr(trainer, stage, True)
        cut = module.on_after_batch_transfer(batch, 0)[0]
        assert cut.shape == (50, 3, 32, 32)
        assert torch.allclose(cut, (images[:50, :, 4:36, 4:36] / 255 - 0.5) / 0.5, atol=1e-6) is crop
    module.augment, trainer.training = torch.nn.Identity(), True
    assert module.on_after_batch_transfer(batch, 0)[0].shape == (50, 3, 32, 32)  # without augmentation the centre too


# --- class folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_class_folders_are_read_with_the_official_labels(class_folders, suffix):
    root = class_folders(train_per_class=20, test_per_class=3, suffix=suffix)
    module = data_module("data=cifar10", f"data.root={root}")
    assert module.counts() == {"train": 180, "val": 20, "test": 30}
    assert "class folders" in module.description
    assert "200 + 30 images, not the full" in module.description
    test = module.test_dataloader()
    assert test.labels.tolist() == list(range(10)) * 3  # from the classes in turn
    with Image.open(root / "test" / "truck" / f"0002.{suffix}") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(test.images[-1].permute(1, 2, 0).numpy(), expected)


def test_images_are_decoded_once_and_again_when_the_tree_changes(class_folders, monkeypatch):
    root = class_folders(suffix="jpg")
    decoded = []
    real = cifar10._decode
    monkeypatch.setattr(cifar10, "_decode", lambda path: decoded.append(path) or real(path))

    first = cifar10.load_class_folders(root)
    assert len(decoded) == 120
    second = cifar10.load_class_folders(root)
    assert len(decoded) == 120
    assert np.array_equal(first.train.images, second.train.images)

    Image.new("RGB", (32, 32), "white").save(root / "test" / "cat" / "0000.jpg")
    third = cifar10.load_class_folders(root)
    assert len(decoded) == 240
    assert third.test.images[3].min() > 250  # cat is class 3
    assert not [path for path in cifar10.cache_dir().iterdir() if path.is_dir()]  # no scratch left


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut off", pickle.dumps({"train": 1})])
def test_a_damaged_cache_is_made_anew(class_folders, damage):
    root = class_folders()
    whole = cifar10.load_class_folders(root)
    caches = list(cifar10.cache_dir().glob("*.npz"))
    for cache in caches:
        cache.write_bytes(damage)
    again = cifar10.load_class_folders(root)
    assert np.array_equal(again.train.images, whole.train.images)


@pytest.mark.parametrize("content", [b"", b"this is no image", "half"])
def test_a_corrupted_image_is_named_and_not_cached(class_folders, content):
    root = class_folders(suffix="jpg")
    victim = root / "train" / "dog" / "0003.jpg"
    victim.write_bytes(victim.read_bytes()[:300] if content == "half" else content)
    with pytest.raises(DataError, match="dog/0003.jpg cannot be read") as refusal:
        cifar10.load_class_folders(root)
    assert "data.root=" in str(refusal.value)
    assert "data=digits" in str(refusal.value)
    Image.new("RGB", (32, 32)).save(victim)
    assert len(cifar10.load_class_folders(root).train.images) == 100


def test_incomplete_and_foreign_trees_are_refused(class_folders):
    root = class_folders()
    Image.new("RGB", (40, 31)).save(root / "test" / "ship" / "0001.png")
    with pytest.raises(DataError, match=r"ship/0001.png is 40×31 pixels"):
        cifar10.load_class_folders(root)
    (root / "train" / "zebra").mkdir()
    with pytest.raises(DataError, match="no CIFAR-10 class: zebra"):
        cifar10.load_class_folders(root)
    for path in (root / "test" / "frog").iterdir():
        path.unlink()
    (root / "train" / "zebra").rmdir()
    with pytest.raises(DataError, match="test/frog holds no png or jpg"):
        cifar10.load_class_folders(root)
    shutil.rmtree(root / "train" / "horse")
    with pytest.raises(DataError, match=r"train lacks the class folder\(s\) horse"):
        cifar10.load_class_folders(root)
    shutil.rmtree(root / "test")
    (root / "train" / "horse").mkdir()
    with pytest.raises(DataError, match="horse holds no|test lacks"):
        cifar10.load_class_folders(root)


# --- the official archive, a small one, from a server on this machine -----------------------------------------------


def test_the_official_archive_is_downloaded_and_used_again(official, tmp_path):
    root = tmp_path / "new" / "data"
    module = data_module("data=cifar10", f"data.root={root}")
    assert module.counts() == {"train": 90, "val": 10, "test": 20}
    assert module.description.startswith("official cifar-10-batches-py")
    assert [path.name for path in root.iterdir()] == [CIFAR10.base_folder]

    official.path.unlink()  # the second time there is nothing to download, and no need to
    again = data_module("data=cifar10", f"data.root={root}")
    assert torch.equal(again.test_dataloader().images, module.test_dataloader().images)


def test_an_archive_in_place_is_unpacked_without_a_download(official, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    official.path.rename(root / official.path.name)
    assert data_module("data=cifar10", f"data.root={root}").counts()["test"] == 20


def test_the_official_files_win_over_class_folders(official, class_folders):
    root = class_folders()
    cifar10.fetch_official(root)
    assert data_module("data=cifar10", f"data.root={root}").description.startswith("official")


def assert_refused(root, *fragments):
    with pytest.raises(DataError) as refusal:
        data_module("data=cifar10", f"data.root={root}")
    for fragment in (*fragments, "data.root=", "data=digits"):
        assert fragment in str(refusal.value)
    assert str(refusal.value).count("\n") <= 1


def test_a_truncated_download_leaves_nothing_behind(official, tmp_path):
    official.path.write_bytes(official.path.read_bytes()[:-50])
    root = tmp_path / "data"
    assert_refused(root, str(root))
    assert not root.exists()


def test_a_truncated_archive_in_place_is_named_and_kept(official, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / official.path.name).write_bytes(official.path.read_bytes()[:-50])
    assert_refused(root, str(root / official.path.name), "truncated or damaged")
    assert [path.name for path in root.iterdir()] == [official.path.name]


def test_without_a_network_the_ways_out_are_named(official, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing.tar.gz")
    root = tmp_path / "data"
    assert_refused(root, "download failed")
    assert not root.exists()


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_official_file_is_named_before_it_is_unpickled(official, tmp_path, damage):
    root = tmp_path / "data"
    cifar10.fetch_official(root)
    victim = root / CIFAR10.base_folder / "data_batch_3"
    if damage == "missing":
        victim.unlink()
    else:
        marker = tmp_path / "payload-ran"
        victim.write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    assert_refused(root, str(victim))
    assert not (tmp_path / "payload-ran").exists()
