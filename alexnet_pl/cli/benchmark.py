"""cli.benchmark."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_pl.benchmark.loops import EPOCH, NAMES, bench
from alexnet_pl.runtime.errors import ConfigError


def report(found: dict[str, Any]) -> str:
    """The figures as a page of text."""
    rates, epochs, floor = found["images_per_second"], found["epoch_seconds"], found["hardware_floor"]
    settings = f"{found['precision']}, {'channels_last' if found['channels_last'] else 'contiguous'}"
    lines = [
        f"{found['device']}, torch {found['versions']['torch']}, {found['threads']} threads, {settings}, "
        f"compile {found['compile']}; medians of {found['repeats']}",
        "",
        f"{'':14}{'images/s':>12}{'s an epoch':>12}",
        *(f"{name:14}{rates[name]:12,.0f}{epochs[name]:12.2f}" for name in NAMES),
        f"{'floor':14}{EPOCH / floor['epoch_seconds']:12,.0f}{floor['epoch_seconds']:12.2f}   "
        f"{floor['gflop_an_image']:.2f} GFLOP an image at {floor['measured_tflops']:.2f} TFLOP/s, "
        f"{floor['adam_gb_a_step']:.2f} GB for Adam at {floor['measured_gb_per_second']:.0f} GB/s",
        "",
        f"project / tutorial       {found['project_vs_tutorial']:.2f}",
        f"project / hand-written   {found['project_vs_handwritten']:.3f}   "
        f"{found['lightning_ms_a_step']:.2f} ms a step of its own, "
        f"checkpoints {found['checkpoint_seconds']['an_epoch']:.2f} s an epoch",
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
        "step at 128",
        *(f"    {name:44} {taken:8.2f} ms" for name, taken in found["step_ms_at_128"].items()),
        f"train.py --cfg job {found['cfg_job_seconds']:.1f} s, smoke run {found['smoke_run_seconds']:.1f} s, "
        f"first step {found['first_step_seconds']:.2f} s, peak memory {found['peak_memory_gb']:.1f} GB",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m alexnet_pl benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="epochs of each loop (default: 5)")
    parser.add_argument("--compile", metavar="MODE", help="compile=MODE for the project and the hand-written loop")
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error("--repeats is at least 1")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device cuda is not possible: torch {torch.__version__} finds no GPU here.")
    found = bench(given.device, given.repeats, given.compile)
    print(report(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
