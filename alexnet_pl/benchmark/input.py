"""How fast pictures come in: ``python -m alexnet_pl benchmark_input``; see ``--help``."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

from alexnet_pl.data.class_folders import list_tree
from alexnet_pl.data.shards.datamodule import StreamLoader, decode_into
from alexnet_pl.data.shards.reader import Shards
from alexnet_pl.data.shards.writer import encode, make_shards
from alexnet_pl.data.transforms import center_crop, normalize
from alexnet_pl.runtime.system import device_name

SIDE, CROP = 256, 224

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(root: Path, count: int, seed: int = 0) -> Path:
    """A tree of ``count`` JPEG files of 500×375 in two classes, and one of each to validate on."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(seed)
    for label, pixels in enumerate(load_sample_images().images):
        scene = Image.fromarray(pixels)
        for split, number in (("train", count // 2), ("val", 1)):
            folder = root / split / f"scene{label}"
            folder.mkdir(parents=True)
            for index in range(number):
                width = int(random.integers(400, scene.width))
                height = width * 3 // 4 if width * 3 // 4 <= scene.height else scene.height
                left, top = random.integers(scene.width - width + 1), random.integers(scene.height - height + 1)
                cut = scene.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
                cut.save(folder / f"{index:05}.jpg", quality=95)
    return root


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU time of ``work`` in seconds, after a first call that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def measure(tree: Path, out: Path, repeats: int) -> dict[str, Any]:
    """Images a second and core, by step; ``bytes`` of a picture file and of a picture in the shards.

    Args:
        tree: holds ``train/<class>/*``; its training pictures are read.
        out: an empty folder for the shards.
    """
    torch.set_num_threads(1)
    listing = list_tree(tree)
    files = [str(tree / path) for path, _ in listing.files["train"]]
    count = len(files)
    make_shards(listing, out, SIDE, per_shard=1024)
    shards = Shards(out)
    everything = torch.arange(count)
    loader = StreamLoader(shards, "train", everything, SIDE, 1, 128)
    contents = shards.read("train", range(count))
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    batch = loader.gather(everything[:128])[0]

    cut = (transforms.Resize(SIDE), transforms.CenterCrop(CROP))
    plain = ImageFolder(tree / "train", transforms.Compose([*cut, transforms.PILToTensor()]))
    usual = ImageFolder(
        tree / "train",
        transforms.Compose(
            [transforms.Resize(SIDE), transforms.RandomCrop(CROP), transforms.RandomHorizontalFlip(),
             transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        ),
    )  # fmt: skip

    def each(function: Callable[[Any], object], values: Sequence[Any]) -> Callable[[], None]:
        def work() -> None:
            for value in values:
                function(value)

        return work

    steps = {
        "ImageFolder: read, decode, resize, crop": each(plain.__getitem__, range(count)),
        "ImageFolder: the same, flip, float, normalise": each(usual.__getitem__, range(count)),
        "shards: make (decode, resize, encode)": each(lambda path: encode(path, SIDE, 95), files),
        "shards: read and check": lambda: [shards.read("train", part.tolist()) for part in everything.split(128)],
        "shards: decode": each(lambda content: decode_into(pixels, content), contents),
        "shards: read, check, decode, batch": lambda: [loader.gather(part) for part in everything.split(128)],
    }
    rates = {name: count / cpu_seconds(work, repeats) for name, work in steps.items()}
    ours = rates["shards: read, check, decode, batch"]
    return {
        "images": count,
        "repeats": repeats,
        "bytes": {"file": sum(Path(path).stat().st_size for path in files) / count,
                  "shard": float(shards.splits["train"].size.mean())},
        "images_per_second_and_core": rates,
        "times_imagefolder": ours / rates["ImageFolder: read, decode, resize, crop"],
        "device": on_device(batch, repeats),
        "cpu": device_name(torch.device("cpu")),
    }  # fmt: skip


def on_device(batch: Tensor, repeats: int) -> dict[str, Any]:
    """Images a second of what a batch of uint8 ``(B, 3, SIDE, SIDE)`` goes through on the GPU, or on one CPU core."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def rate(work: Callable[[], object]) -> float:
        work()
        taken = []
        for _ in range(max(repeats, 5)):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter() if device.type == "cuda" else time.process_time()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append((time.perf_counter() if device.type == "cuda" else time.process_time()) - start)
        return len(batch) / statistics.median(taken)

    there = batch.to(device)
    rates = {"crop, normalise": rate(lambda: normalize(center_crop(there, CROP), MEAN, STD))}
    if device.type == "cuda":
        rates["transfer"] = rate(lambda: batch.to(device))
    return {"name": device_name(device), "images_per_second": rates}
