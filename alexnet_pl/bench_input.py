"""How fast pictures come in: ``python -m alexnet_pl.bench_input``; see ``--help``."""

import argparse
import json
import statistics
import tempfile
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

from alexnet_pl.augment import center_crop, normalize
from alexnet_pl.data.make_shards import encode, make_shards
from alexnet_pl.data.shards import Shards
from alexnet_pl.data.streaming import StreamLoader, decode_into
from alexnet_pl.data.tree import list_tree
from alexnet_pl.errors import one_line_errors
from alexnet_pl.results import device_name

SIDE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DESCRIPTION = f"""\
Images a second of each step from a picture file to a batch on the device, for one CPU core, against what is usual:
torchvision's ImageFolder with Pillow. The steps of this project are measured on shards of the same pictures.

CPU time is counted, not time on the clock: other work on the machine hardly matters. Medians of the repeats, each over
all pictures, {SIDE} pixels stored and {CROP} trained on."""

EPILOG = """\
  Without --tree the pictures are cut from the two photographs that come with scikit-learn and saved as JPEG files of
  500×375 pixels: real photographs, about as large as ImageNet's, but of two scenes only.

  Cores that a GPU needs = its images/s in training (python -m alexnet_pl.bench) ÷ images/s a core below."""


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


def report(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"{result['images']:,} pictures, {result['bytes']['file'] / 1e3:.0f} kB a file, "
        f"{result['bytes']['shard'] / 1e3:.0f} kB in the shards; {result['cpu']}",
        "",
        f"{'one core':48}{'images/s':>10}{'ms':>9}",
    ]
    for name, rate in result["images_per_second_and_core"].items():
        lines.append(f"{name:48}{rate:10,.0f}{1e3 / rate:9.3f}")
    lines += ["", f"shards against ImageFolder (read, decode, resize, crop): {result['times_imagefolder']:.1f} times"]
    lines += ["", f"on {result['device']['name']}"]
    for name, rate in result["device"]["images_per_second"].items():
        lines.append(f"{name:48}{rate:10,.0f}{1e3 / rate:9.3f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl.bench_input", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--tree", type=Path, metavar="TREE", help="class folders of your own; all of train/ is read")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="photographs to cut (default: 512)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        tree = given.tree or photographs(Path(scratch) / "tree", max(given.images, 2))
        result = measure(tree, Path(scratch) / "shards", max(given.repeats, 1))
    print(report(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
