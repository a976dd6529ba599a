"""cli.export."""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from alexnet_pl.data.image_io import picture_files, read_picture
from alexnet_pl.inference.exporters import CHECKED, SUFFIXES, export
from alexnet_pl.inference.trained_run import RUN_HELP, load_run

DESCRIPTION = """\
Write a trained run as one self-contained file, and check it against the original before saying so.

onnx and torch_export take resized pictures as they are, uint8 (N, 3, S, S) with any N, and give logits and
probabilities: the normalisation is in the graph. How to resize, and the names of the classes, are in the metadata.
safetensors holds the weights; the metadata has the network's description too."""

EPILOG = """\
  The file is checked on random and on real images, in batches of 1 and more, and is not written where a logit or a
  probability differs by more than 1e-4. The real images are cut from two photographs that come with scikit-learn, or
  those of --images.

  metadata: class_names, image_size, resize_size, mean, std, preprocessing, run (each a JSON value). In Python:
    onnxruntime.InferenceSession(f).get_modelmeta().custom_metadata_map
    files = {"metadata.json": ""}; torch.export.load(f, extra_files=files)
    safetensors.safe_open(f, "pt").metadata()

It needs the extra "export": pip install 'alexnet_pl[export]'."""


# --- images to check on ---------------------------------------------------------------------------------------------


def real_pictures(paths: Sequence[Path] = ()) -> list[Image.Image]:
    """The first :data:`CHECKED` pictures of ``paths``; without any as many cut from scikit-learn's two photographs.

    Raises:
        DataError: one of them cannot be read.
    """
    if paths:
        return [read_picture(path) for path in picture_files(paths)[:CHECKED]]
    random = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    pictures = []
    for index in range(CHECKED):
        photograph = photographs[index % len(photographs)]
        side = int(random.integers(32, min(photograph.size) + 1))
        left, top = (int(random.integers(0, room - side + 1)) for room in photograph.size)
        pictures.append(photograph.crop((left, top, left + side, top + side)))
    return pictures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl export", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--format", choices=tuple(SUFFIXES), required=True)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: model.onnx, .pt2 or .safetensors beside RUN's files"
    )
    parser.add_argument("--images", nargs="+", type=Path, default=[], metavar="PATH", help="pictures to check on")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    run = load_run(given.run)
    path = given.out or run.folder / f"model{SUFFIXES[given.format]}"
    pictures = real_pictures(given.images)
    images = torch.stack([run.preprocess.pixels(picture) for picture in pictures])
    differences = export(run, given.format, path, images)
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB, {run.name}, epoch {run.epoch}")
    print(f"input      images, uint8 (N, 3, {run.preprocess.image_size}, {run.preprocess.image_size}), any N")
    print(f"classes    {', '.join(run.class_names)}")
    print(f"largest difference from the original: {differences['random']:.2g} on {CHECKED} random, ", end="")
    print(f"{differences['real']:.2g} on {len(images)} real images")
