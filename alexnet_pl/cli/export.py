"""Export command: ``alexnet export RUN --format onnx``."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.cli.parser import add_run, make_parser, output_file
from alexnet_pl.inference.options import SUFFIXES
from alexnet_pl.runtime.errors import printable

DESCRIPTION = """\
Write a trained run as one self-contained file, after checking it against the original network.

onnx and torch_export take resized uint8 images (N, 3, S, S) for any N and return logits and probabilities; the
normalization is part of the graph. The metadata holds the resize steps and the class names.
safetensors holds the weights only; its metadata also describes the network."""

EPILOG = """\
  The file is checked on random and on real images, in batches of 1 and more, and discarded if a logit or a probability
  differs by more than 1e-4. The real images come from --images, or are cut from the two photographs that ship with
  scikit-learn.

  metadata: class_names, image_size, resize_size, mean, std, preprocessing, run (each a JSON value). In Python:
    onnxruntime.InferenceSession(f).get_modelmeta().custom_metadata_map
    files = {"metadata.json": ""}; torch.export.load(f, extra_files=files)
    safetensors.safe_open(f, "pt").metadata()

Needs the extra "export": pip install 'alexnet_pl[export]'."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("export", DESCRIPTION, EPILOG)
    add_run(parser)
    parser.add_argument("--format", choices=tuple(SUFFIXES), required=True)
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE",
        help="default: model.onnx, .pt2 or .safetensors in the run directory, or here for a run from a hub",
    )
    parser.add_argument("--images", nargs="+", type=Path, default=[], metavar="PATH", help="images to check on")
    args = parser.parse_args(arguments)
    import torch  # here for start-up time: --help needs no torch

    from alexnet_pl.inference.exporters import CHECKED, export, real_images
    from alexnet_pl.inference.hub import is_hub_address
    from alexnet_pl.inference.trained_run import load_run

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    run = load_run(args.run, args.trust)
    folder = Path() if is_hub_address(args.run) else run.folder  # whose files are those of the hub's cache
    path = args.out or folder / f"model{SUFFIXES[args.format]}"
    images = torch.stack([run.preprocess.pixels(image) for image in real_images(args.images)])
    differences = export(run, args.format, path, images)
    print(f"{path}  {path.stat().st_size / 1e6:.1f} MB, {printable(run.name)}, epoch {run.epoch}")
    print(f"input      images, uint8 (N, 3, {run.preprocess.image_size}, {run.preprocess.image_size}), any N")
    print(f"classes    {printable(', '.join(run.class_names))}")
    print(f"largest difference from the original: {differences['random']:.2g} on {CHECKED} random, ", end="")
    print(f"{differences['real']:.2g} on {len(images)} real images")
