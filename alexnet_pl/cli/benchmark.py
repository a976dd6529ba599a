"""Speed benchmarks: ``alexnet benchmark`` of the training loop, with ``--input`` of the input pipeline."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alexnet_pl.benchmark import render
from alexnet_pl.cli.parser import make_parser, positive_int, write_output
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.files import fill_section

DESCRIPTION = """\
Measure the speed of the training loop against the tutorial's loop, a hand-written one and the hardware floor.

On a GPU, one call measures everything: these loops at two batch sizes, eager and compiled, LRN, input, the tutorial's
whole run, trials that share the GPU, and several seeds trained as one network.

With --input, measure each step from an image file to a batch on the device, per CPU core, against the usual way:
torchvision's ImageFolder with Pillow. The steps of this project read shards of the same images, stored at 256 pixels
and cropped to 224. CPU time is counted, so other work on the machine hardly matters.

All numbers are medians over the repeats. Progress goes to stderr, the result to stdout as Markdown."""

EPILOG = """\
  Without --tree the input benchmark cuts images from the two photographs that ship with scikit-learn and saves them as
  JPEG files of 500×375 pixels: real photographs, about as large as ImageNet's, but of two scenes only.

  CPU cores that a GPU needs = its images/s in training (without --input) ÷ images/s per core (with --input).

examples:
  alexnet benchmark --device cpu --json docs/results/bench-mine-1.json
  alexnet benchmark --device cuda --json docs/results/bench-gpu.json
  alexnet benchmark --workers
  alexnet benchmark --load --json load.json
  OMP_NUM_THREADS=2 alexnet benchmark --load
  alexnet benchmark --input --images 256
  alexnet benchmark --growth --largest 10000
  alexnet benchmark --page docs/speed.md"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("benchmark", DESCRIPTION, EPILOG)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--input", action="store_true", help="measure the input pipeline instead")
    what.add_argument("--load", action="store_true", help="measure training on the CPU beside busy processes instead")
    what.add_argument("--workers", action="store_true", help="measure one worker per core against one on all cores")
    what.add_argument(
        "--growth", action="store_true", help="measure how cost grows with images, classes, epochs, trials"
    )
    what.add_argument(
        "--page", type=Path, metavar="FILE", help="write docs/speed.md from results/bench-*.json beside it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number as JSON, and FILE.md")
    parser.add_argument("--repeats", type=positive_int, default=None, metavar="N", help="default: 5 (3 on a GPU)")
    parser.add_argument("--full", action="store_true", help="longer epochs, and a batch of 2,048 too")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="cuda: everything in one call; default: what is there"
    )
    parser.add_argument("--compile", metavar="MODE", help="on a CPU: compile the project and the hand-written loop")
    parser.add_argument("--tree", type=Path, metavar="DIR", help="with --input: ImageFolder layout, train/ is read")
    parser.add_argument("--images", type=positive_int, default=512, metavar="N", help="with --input: default 512")
    parser.add_argument(
        "--largest", type=positive_int, default=10**6, metavar="N", help="with --growth: counts above it are left out"
    )
    args = parser.parse_args(arguments)
    mode = next((name for name in ("input", "load", "workers", "growth", "page") if getattr(args, name)), None)
    for name in ("device", "compile", "full"):
        if mode and getattr(args, name):
            parser.error(f"--{mode} excludes --{name}: it measures on the CPU, in its own way")
    if mode in ("growth", "page") and args.repeats:
        parser.error(f"--{mode} excludes --repeats")
    if args.device == "cuda" and (args.compile or args.full):
        parser.error("--device cuda excludes --compile and --full: it measures both in one call")
    if args.page:
        results, readme = args.page.parent / "results", args.page.parent.parent / "README.md"
        write_output(args.page, render.page(results))
        print(f"page {args.page}")
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        if (filled := fill_section(text, render.SECTION, render.speed_line(results))) is not None:
            write_output(readme, filled)
            print(f"text {readme}")
        return
    found = measure(args)
    print(render.markdown(found))
    if args.json:
        write_output(args.json, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        write_output(args.json.with_suffix(".md"), render.markdown(found))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers that the arguments ask for.

    Raises:
        ConfigError: there is no GPU for ``--device cuda``.
    """
    import torch  # here for start-up time, as everything that loads it: --help and --page need none

    from alexnet_pl.benchmark.components import bench, environment

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.input:
        return {"kind": "input", **environment(torch.device("cpu")), **measure_input(args)}
    if args.load:
        from alexnet_pl.benchmark.load import bench_load

        return {"kind": "load", **environment(torch.device("cpu")), **bench_load(args.repeats or 3)}
    if args.growth:
        return {"kind": "growth", **environment(torch.device("cpu")), "rows": measure_growth(args.largest)}
    if args.workers:
        from alexnet_pl.benchmark.workers import bench_layouts

        return {"kind": "workers", **environment(torch.device("cpu")), **bench_layouts(2560, args.repeats or 3)}
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device=cuda is invalid: torch {torch.__version__} finds no GPU here. Use --device cpu.")
    if device == "cuda":
        from alexnet_pl.benchmark.gpu import Sizes, bench_gpu

        return bench_gpu(device, Sizes(repeats=args.repeats or 3))
    return bench(device, args.repeats or 5, args.compile, args.full)


def measure_input(args: argparse.Namespace) -> dict[str, Any]:
    """Return the input benchmark's numbers, on ``--tree`` or on generated images that are removed afterwards."""
    from alexnet_pl.benchmark.input import measure as measure_pipeline  # start-up time
    from alexnet_pl.benchmark.input import photographs

    with tempfile.TemporaryDirectory() as scratch:
        tree = args.tree or photographs(Path(scratch) / "tree", max(args.images, 2))
        return measure_pipeline(tree, Path(scratch) / "shards", args.repeats or 5)


def measure_growth(largest: int) -> list[dict[str, Any]]:
    """Return the rows of the growth benchmark up to a count."""
    from alexnet_pl.benchmark.growth import CLASSES, EPOCHS, IMAGES, grow, grow_classes, grow_epochs, grow_images
    from alexnet_pl.studies.growth import TRIALS, grow_trials

    rows = []
    for measure_row, counts in (
        (grow_trials, TRIALS),
        (grow_epochs, EPOCHS),
        (grow_classes, CLASSES),
        (grow_images, IMAGES),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            rows += grow(measure_row, [count for count in counts if count <= largest], Path(scratch))
    return [asdict(row) for row in rows]
