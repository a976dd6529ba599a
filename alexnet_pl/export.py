"""Write a trained run as one file for other programs: ``python -m alexnet_pl.export RUN --format onnx``."""

import argparse
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from alexnet_pl.augment import scale_and_shift
from alexnet_pl.errors import UserError, one_line_errors
from alexnet_pl.pictures import picture_files, read_picture
from alexnet_pl.runs import RUN_HELP, TrainedRun, build_net, load_run

TOLERANCE = 1e-4
"""Largest difference in a logit or a probability that passes."""
CHECKED = 64
"""Images of each kind that an export is checked on."""
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}

Runner = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 ``(N, 3, S, S)`` → logits and probabilities, float32 ``(N, num_classes)`` each."""

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


class Deployable(nn.Module):
    """A network with the normalisation before it and the softmax behind it."""

    def __init__(self, run: TrainedRun):
        super().__init__()
        self.net = run.net
        scale, shift = scale_and_shift(run.preprocess.mean, run.preprocess.std, torch.device("cpu"))
        self.register_buffer("scale", scale.clone())
        self.register_buffer("shift", shift.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 ``(N, 3, S, S)`` → logits and probabilities, float32 ``(N, num_classes)`` each."""
        logits = self.net(images.float() * self.scale + self.shift)
        return logits, logits.softmax(1)


def export(run: TrainedRun, form: str, path: Path, images: Tensor) -> dict[str, float]:
    """Write ``path`` in a format of :data:`SUFFIXES`, whole and checked or not at all.

    Args:
        images: real ones to check on, uint8 ``(N, 3, S, S)``.

    Returns:
        The largest absolute difference from the original on ``random`` and on ``real`` images.

    Raises:
        UserError: a package is missing, the file cannot be written, or it differs from the original.
    """
    write, read = {
        "onnx": (write_onnx, read_onnx),
        "torch_export": (write_torch_export, read_torch_export),
        "safetensors": (write_safetensors, read_safetensors),
    }[form]
    original = Deployable(run).eval()
    random = torch.randint(
        0, 256, (CHECKED, *images.shape[1:]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
            draft = Path(scratch) / f"model{SUFFIXES[form]}"  # torch asks for its own suffix
            write(original, metadata(run), draft)
            copy = read(draft)
            differences = {"random": difference(original, copy, random), "real": difference(original, copy, images)}
            if not max(differences.values()) <= TOLERANCE:
                raise UserError(f"{path} was not written: its outputs differ by {differences}, more than {TOLERANCE}.")
            os.replace(draft, path)
    except ImportError as error:
        raise UserError(f"{form} needs the package {error.name}: pip install 'alexnet_pl[export]'.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    return differences


def metadata(run: TrainedRun) -> dict[str, str]:
    """What a user of the file must know, each value as JSON."""
    steps = run.preprocess
    values: dict[str, Any] = {
        "class_names": run.class_names,
        "image_size": steps.image_size,
        "resize_size": steps.resize_size or steps.image_size,
        "mean": steps.mean,
        "std": steps.std,
        "preprocessing": f"RGB; {'the central square; ' * steps.keep_ratio}bilinear antialiased resize to "
        "resize_size × resize_size in uint8; the centre of image_size × image_size; (x / 255 - mean) / std",
        "model": run.config["model"],
        "run": {"name": run.name, "epoch": run.epoch, "alexnet_pl": version("alexnet_pl")},
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def difference(original: nn.Module, copy: Runner, images: Tensor) -> float:
    """Largest absolute difference in logits and probabilities, over one batch of one image and one of the others."""
    largest = 0.0
    for batch in (images[:1], images[1:]):
        if len(batch) == 0:
            continue
        with torch.no_grad():
            outputs = zip(original(batch), copy(batch), strict=True)
        for ours, theirs in outputs:
            largest = max(largest, float((ours - theirs).abs().max().nan_to_num(torch.inf)))
    return largest


# --- the formats ----------------------------------------------------------------------------------------------------


def _example(model: Deployable, about: dict[str, str]) -> tuple[Tensor, dict[str, Any]]:
    """A batch to trace with, and that its first dimension may be of any size from 1."""
    side = int(about["image_size"])
    return torch.zeros(2, 3, side, side, dtype=torch.uint8), {"images": {0: torch.export.Dim("batch", min=1)}}


def write_onnx(model: Deployable, about: dict[str, str], path: Path) -> None:
    """With the weights inside: a protobuf of up to 2 GB."""
    import onnx

    batch, shapes = _example(model, about)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        model, (batch,), input_names=["images"], output_names=["logits", "probabilities"], dynamic_shapes=shapes,
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    proto = program.model_proto
    onnx.helper.set_model_props(proto, about)
    onnx.checker.check_model(proto)
    onnx.save_model(proto, path, save_as_external_data=False)


def read_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, probabilities = session.run(["logits", "probabilities"], {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(probabilities)

    return run


def write_torch_export(model: Deployable, about: dict[str, str], path: Path) -> None:
    batch, shapes = _example(model, about)
    program = torch.export.export(model, (batch,), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(about, ensure_ascii=False)})


def read_torch_export(path: Path) -> Runner:
    return torch.export.load(path).module()


def write_safetensors(model: Deployable, about: dict[str, str], path: Path) -> None:
    from safetensors.torch import save

    weights = {name: value.contiguous() for name, value in model.net.state_dict().items()}
    path.write_bytes(save(weights, metadata={**about, "format": "pt"}))


def read_safetensors(path: Path) -> Runner:
    """The network made anew from the file alone."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}
        net = build_net(about["model"])
        net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, not a dict
    net.eval()
    scale, shift = scale_and_shift(tuple(about["mean"]), tuple(about["std"]), torch.device("cpu"))

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(images.float() * scale + shift)
        return logits, logits.softmax(1)

    return run


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
        prog="python -m alexnet_pl.export", description=DESCRIPTION, epilog=EPILOG,
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


if __name__ == "__main__":
    with one_line_errors():
        main()
