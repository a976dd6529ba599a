"""Speed of the input pipeline per CPU core, measured against torchvision's ImageFolder with Pillow."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

from alexnet_pl.benchmark.timing import Work, cpu_seconds, median_seconds, wall_timer
from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.shards.datamodule import StreamLoader, decode_into
from alexnet_pl.data.shards.reader import Shards
from alexnet_pl.data.shards.writer import encode, make_shards
from alexnet_pl.data.transforms import center_crop, normalize
from alexnet_pl.runtime.system import device_name

SIDE, CROP = 256, 224
"""Pixels stored in shards and pixels trained on, as in the paper."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalization constants of torchvision's ImageNet recipes."""

IMAGE_FOLDER, SHARDS = "ImageFolder: read, decode, resize, crop", "shards: read, check, decode, batch"

Value = TypeVar("Value")


def photographs(root: Path, count: int, seed: int = 0) -> Path:
    """Write ``count`` training JPEGs of 500×375 pixels in two classes, and one per class for validation.

    The images are random crops of the two photographs that scikit-learn ships. Returns ``root``.
    """
    from sklearn.datasets import load_sample_images  # start-up time: only needed without a dataset of one's own

    random = np.random.default_rng(seed)
    for label, pixels in enumerate(load_sample_images().images):
        scene = Image.fromarray(pixels)
        for split, number in (("train", count // 2), ("val", 1)):
            directory = root / split / f"scene{label}"
            directory.mkdir(parents=True)
            for index in range(number):
                width = int(random.integers(400, scene.width))
                height = min(width * 3 // 4, scene.height)
                left, top = (int(random.integers(room + 1)) for room in (scene.width - width, scene.height - height))
                box = (left, top, left + width, top + height)
                image = scene.resize((500, 375), Image.Resampling.BICUBIC, box)
                image.save(directory / f"{index:05}.jpg", quality=95)
    return root


def measure(tree: Path, out: Path, repeats: int) -> dict[str, Any]:
    """Return images per second per core for each step of the pipeline, and the bytes per image in files and shards.

    Args:
        tree: ImageFolder layout. All images of ``train/<class>/`` are read.
        out: empty directory for the shards.
        repeats: timed rounds over all images.
    """
    torch.set_num_threads(1)
    listing = list_splits(tree)
    files = [str(tree / path) for path, _ in listing.files["train"]]
    make_shards(listing, out, SIDE, per_shard=1024)
    shards = Shards(out)
    loader = StreamLoader(shards, "train", torch.arange(len(files)), SIDE, 1, 128)
    works = {**image_folder_steps(tree, len(files)), **shard_steps(files, shards, loader)}
    taken = median_seconds(works, cpu_seconds, repeats, warm_up=1)
    rates = {name: len(files) / seconds for name, seconds in taken.items()}
    return {
        "images": len(files),
        "repeats": repeats,
        "bytes": {
            "file": sum(Path(path).stat().st_size for path in files) / len(files),
            "shard": float(shards.splits["train"].size.mean()),
        },
        "images_per_second_per_core": rates,
        "times_imagefolder": rates[SHARDS] / rates[IMAGE_FOLDER],
        "device": on_device(loader.gather(torch.arange(min(128, len(files))))[0], repeats),
        "cpu": device_name(torch.device("cpu")),
    }


def image_folder_steps(tree: Path, count: int) -> dict[str, Work]:
    """Return the two usual torchvision pipelines over ``count`` images: test and training transforms."""
    test = transforms.Compose([transforms.Resize(SIDE), transforms.CenterCrop(CROP), transforms.PILToTensor()])
    train = transforms.Compose(
        [
            transforms.Resize(SIDE),
            transforms.RandomCrop(CROP),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return {
        IMAGE_FOLDER: for_each(ImageFolder(tree / "train", test).__getitem__, range(count)),
        "ImageFolder: the same, flip, float, normalize": for_each(
            ImageFolder(tree / "train", train).__getitem__, range(count)
        ),
    }


def shard_steps(files: list[str], shards: Shards, loader: StreamLoader) -> dict[str, Work]:
    """Return the steps from an image file to a uint8 batch ``(B, 3, SIDE, SIDE)`` by way of shards."""
    contents = shards.read("train", range(len(files)))
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    batches = torch.arange(len(files)).split(128)
    return {
        "shards: make (decode, resize, encode)": for_each(lambda path: encode(path, SIDE, 95), files),
        "shards: read and check": for_each(lambda part: shards.read("train", part.tolist()), batches),
        "shards: decode": for_each(lambda content: decode_into(pixels, content), contents),
        SHARDS: for_each(loader.gather, batches),
    }


def for_each(function: Callable[[Value], object], values: Iterable[Value]) -> Work:
    """Return a function that calls ``function`` on every value."""

    def work() -> None:
        for value in values:
            function(value)

    return work


def on_device(batch: Tensor, repeats: int) -> dict[str, Any]:
    """Return images per second of what a uint8 batch ``(B, 3, SIDE, SIDE)`` goes through on the GPU, or on one core."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = wall_timer(device) if device.type == "cuda" else cpu_seconds
    moved = batch.to(device)
    works: dict[str, Work] = {"crop, normalize": lambda: normalize(center_crop(moved, CROP), MEAN, STD)}
    if device.type == "cuda":
        works["transfer"] = lambda: batch.to(device)
    taken = median_seconds(works, timer, max(repeats, 5), warm_up=1)
    return {"name": device_name(device), "images_per_second": {name: len(batch) / s for name, s in taken.items()}}
