"""cli.benchmark_input."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_pl.benchmark.input import CROP, SIDE, measure, photographs

DESCRIPTION = f"""\
Images a second of each step from a picture file to a batch on the device, for one CPU core, against what is usual:
torchvision's ImageFolder with Pillow. The steps of this project are measured on shards of the same pictures.

CPU time is counted, not time on the clock: other work on the machine hardly matters. Medians of the repeats, each over
all pictures, {SIDE} pixels stored and {CROP} trained on."""

EPILOG = """\
  Without --tree the pictures are cut from the two photographs that come with scikit-learn and saved as JPEG files of
  500×375 pixels: real photographs, about as large as ImageNet's, but of two scenes only.

  Cores that a GPU needs = its images/s in training (python -m alexnet_pl benchmark) ÷ images/s a core below."""


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
        prog="python -m alexnet_pl benchmark_input", description=DESCRIPTION, epilog=EPILOG,
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
