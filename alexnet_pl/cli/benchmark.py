"""Speed benchmarks: ``alexnet benchmark`` of the training loop, with ``--input`` of the input pipeline."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_pl.benchmark.components import bench
from alexnet_pl.benchmark.input import CROP, SIDE, measure, photographs
from alexnet_pl.benchmark.load import bench_load, load_report
from alexnet_pl.benchmark.loops import EPOCH, NAMES
from alexnet_pl.cli.parser import make_parser, positive_int, write_output
from alexnet_pl.runtime.errors import ConfigError

DESCRIPTION = f"""\
Measure the speed of the training loop against the tutorial's loop, a hand-written one and the hardware floor.

With --input, measure each step from an image file to a batch on the device, per CPU core, against the usual way:
torchvision's ImageFolder with Pillow. The steps of this project read shards of the same images, stored at {SIDE} pixels
and cropped to {CROP}. CPU time is counted, so other work on the machine hardly matters.

All numbers are medians over the repeats."""

EPILOG = """\
  Without --tree the input benchmark cuts images from the two photographs that ship with scikit-learn and saves them as
  JPEG files of 500×375 pixels: real photographs, about as large as ImageNet's, but of two scenes only.

  CPU cores that a GPU needs = its images/s in training (without --input) ÷ images/s per core (with --input).

examples:
  alexnet benchmark --device cpu --json speed.json
  alexnet benchmark --load --json load.json
  OMP_WAIT_POLICY=ACTIVE alexnet benchmark --load
  alexnet benchmark --input --images 256"""


def report(found: dict[str, Any]) -> str:
    """Return the training benchmark's numbers as aligned text."""
    rates, epochs, floor = found["images_per_second"], found["epoch_seconds"], found["hardware_floor"]
    settings = f"{found['precision']}, {'channels_last' if found['channels_last'] else 'contiguous'}"
    lines = [
        f"{found['device']}, torch {found['versions']['torch']}, {found['threads']} threads, {settings}, "
        f"compile {found['compile']}; median of {found['repeats']}",
        "",
        f"{'':14}{'images/s':>12}{'s/epoch':>12}",
        *(f"{name:14}{rates[name]:12,.0f}{epochs[name]:12.2f}" for name in NAMES),
        f"{'floor':14}{EPOCH / floor['epoch_seconds']:12,.0f}{floor['epoch_seconds']:12.2f}   "
        f"{floor['gflop_per_image']:.2f} GFLOP per image at {floor['measured_tflops']:.2f} TFLOP/s, "
        f"{floor['adam_gb_per_step']:.2f} GB for Adam at {floor['measured_gb_per_second']:.0f} GB/s",
        "",
        f"project / tutorial       {found['project_vs_tutorial']:.2f}",
        f"project / hand-written   {found['project_vs_handwritten']:.3f}   "
        f"overhead {found['lightning_ms_per_step']:.2f} ms per step, "
        f"checkpoints {found['checkpoint_seconds']['per_epoch']:.2f} s per epoch",
        f"input path alone         {found['input_images_per_second']:,.0f} images/s, "
        f"with crop and flip {found['input_images_per_second_crop_flip']:,.0f}",
        "LRN / nn.LocalResponseNorm, forward and backward",
        *(
            f"    {shape:16} {entry['ms']:8.2f} ms, torch {entry['torch_ms']:8.2f} ms: {entry['ratio']:.1f}×"
            for shape, entry in found["lrn"].items()
        ),
        "step by batch size",
        *(
            f"    {size:16} {taken:8.2f} ms, {found['step_images_per_second'][size]:,.0f} images/s"
            for size, taken in found["step_ms"].items()
        ),
        "step at batch size 128",
        *(f"    {name:44} {taken:8.2f} ms" for name, taken in found["step_ms_at_128"].items()),
        f"train.py --cfg job {found['cfg_job_seconds']:.1f} s, smoke run {found['smoke_run_seconds']:.1f} s, "
        f"first step {found['first_step_seconds']:.2f} s, peak memory {found['peak_memory_gb']:.1f} GB",
    ]
    return "\n".join(lines)


def input_report(found: dict[str, Any]) -> str:
    """Return the input benchmark's numbers as aligned text."""

    def rows(rates: dict[str, float]) -> list[str]:
        return [f"{name:48}{rate:10,.0f}{1e3 / rate:9.3f}" for name, rate in rates.items()]

    return "\n".join([
        f"{found['images']:,} images, {found['bytes']['file'] / 1e3:.0f} kB per file, "
        f"{found['bytes']['shard'] / 1e3:.0f} kB in the shards; {found['cpu']}",
        "",
        f"{'one core':48}{'images/s':>10}{'ms':>9}",
        *rows(found["images_per_second_per_core"]),
        "",
        f"shards / ImageFolder (read, decode, resize, crop): {found['times_imagefolder']:.1f}×",
        "",
        f"on {found['device']['name']}",
        *rows(found["device"]["images_per_second"]),
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("benchmark", DESCRIPTION, EPILOG)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number as JSON")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", metavar="MODE", help="compile=MODE for the project and the hand-written loop")
    parser.add_argument("--input", action="store_true", help="measure the input pipeline instead")
    parser.add_argument("--load", action="store_true", help="measure training on the CPU beside busy processes instead")
    parser.add_argument("--tree", type=Path, metavar="DIR", help="with --input: ImageFolder layout, train/ is read")
    parser.add_argument("--images", type=positive_int, default=512, metavar="N", help="with --input: default 512")
    args = parser.parse_args(arguments)
    if args.load:
        found = bench_load(args.repeats)
        print(load_report(found))
    else:
        found = measure_input(args) if args.input else measure_training(args)
        print(input_report(found) if args.input else report(found))
    if args.json:
        write_output(args.json, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def measure_training(args: argparse.Namespace) -> dict[str, Any]:
    """Return the training benchmark's numbers.

    Raises:
        ConfigError: there is no GPU for ``--device cuda``.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device=cuda is invalid: torch {torch.__version__} finds no GPU here. Use --device cpu.")
    return bench(args.device, args.repeats, args.compile)


def measure_input(args: argparse.Namespace) -> dict[str, Any]:
    """Return the input benchmark's numbers, on ``--tree`` or on generated images that are removed afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = args.tree or photographs(Path(scratch) / "tree", max(args.images, 2))
        return measure(tree, Path(scratch) / "shards", args.repeats)
