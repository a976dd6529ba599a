"""Export of a trained run as ONNX, torch.export or safetensors, checked against the original network."""

import json
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from alexnet_pl.data.image_io import image_files, read_image
from alexnet_pl.data.transforms import scale_and_shift
from alexnet_pl.inference.options import SUFFIXES
from alexnet_pl.inference.trained_run import TrainedRun, load_net
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.files import replacing

TOLERANCE = 1e-4
"""Largest accepted difference in a logit or a probability."""

CHECKED = 64
"""Random images and real images that an export is checked on, each."""

Runner = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 ``(N, 3, S, S)`` → logits and probabilities, float32 ``(N, num_classes)`` each."""


class Deployable(nn.Module):
    """A network between the normalization of its input and the softmax of its logits."""

    scale: Tensor
    shift: Tensor

    def __init__(self, run: TrainedRun):
        super().__init__()
        self.net = run.net
        scale, shift = scale_and_shift(run.preprocess.mean, run.preprocess.std, torch.device("cpu"))
        self.register_buffer("scale", scale.clone())
        self.register_buffer("shift", shift.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities, float32 ``(N, num_classes)`` each, of uint8 ``(N, 3, S, S)``."""
        logits = self.net(images.float() * self.scale + self.shift)
        return logits, logits.softmax(1)


def export(run: TrainedRun, form: str, path: Path, images: Tensor) -> dict[str, float]:
    """Write ``path`` in a format of :data:`SUFFIXES`, complete and checked or not at all.

    Args:
        images: real images to check on, uint8 ``(N, 3, S, S)``.

    Returns:
        Largest absolute difference from the original on ``random`` and on ``real`` images.

    Raises:
        UserError: a package is missing, the file cannot be written, or its outputs differ from the original's.
    """
    write, read = {
        "onnx": (write_onnx, read_onnx),
        "torch_export": (write_torch_export, read_torch_export),
        "safetensors": (write_safetensors, lambda file: read_safetensors(file, run.trust)),
    }[form]
    original = Deployable(run).eval()
    random = torch.randint(
        0, 256, (CHECKED, *images.shape[1:]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            draft = scratch.with_suffix(SUFFIXES[form])  # torch insists on its own suffix
            write(original, metadata(run), draft)
            copy = read(draft)
            differences = {"random": difference(original, copy, random), "real": difference(original, copy, images)}
            if not max(differences.values()) <= TOLERANCE:
                raise UserError(f"{path} was not written: its outputs differ by {differences}, more than {TOLERANCE}.")
            draft.replace(scratch)
    except ImportError as error:
        raise UserError(f"{form} needs the package {error.name}: pip install 'alexnet_pl[export]'.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    return differences


def real_images(paths: Sequence[Path] = ()) -> list[Image.Image]:
    """Return the first :data:`CHECKED` images of ``paths``, by default as many crops of scikit-learn's two photographs.

    Raises:
        DataError: one of them cannot be read.
    """
    if paths:
        return [read_image(path) for path in image_files(paths)[:CHECKED]]
    from sklearn.datasets import load_sample_images  # takes a second, which other callers of this module need not wait

    random = np.random.default_rng(0)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    crops = []
    for index in range(CHECKED):
        photograph = photographs[index % len(photographs)]
        side = int(random.integers(32, min(photograph.size) + 1))
        left, top = (int(random.integers(0, length - side + 1)) for length in photograph.size)
        crops.append(photograph.crop((left, top, left + side, top + side)))
    return crops


def metadata(run: TrainedRun) -> dict[str, str]:
    """Return what a user of the file has to know, each value as JSON."""
    steps = run.preprocess
    values: dict[str, Any] = {
        "class_names": run.class_names,
        "image_size": steps.image_size,
        "resize_size": steps.resize_size or steps.image_size,
        "mean": steps.mean,
        "std": steps.std,
        "preprocessing": f"RGB; {'the central square; ' * steps.keep_ratio}bilinear antialiased resize to "
        "resize_size × resize_size in uint8; the center crop of image_size × image_size; (x / 255 - mean) / std",
        "model": run.config["model"],
        "run": {"name": run.name, "epoch": run.epoch, "alexnet_pl": version("alexnet_pl")},
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def difference(original: nn.Module, copy: Runner, images: Tensor) -> float:
    """Return the largest absolute difference in logits and probabilities, over one image and a batch of the rest."""
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
    """Return a batch to trace with, and the dynamic shapes that make its first dimension arbitrary."""
    side = int(about["image_size"])
    return torch.zeros(2, 3, side, side, dtype=torch.uint8), {"images": {0: torch.export.Dim("batch", min=1)}}


def write_onnx(model: Deployable, about: dict[str, str], path: Path) -> None:
    """Write ONNX with the weights inside, a protobuf of at most 2 GB."""
    import onnx

    batch, shapes = _example(model, about)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        model, (batch,), input_names=["images"], output_names=["logits", "probabilities"], dynamic_shapes=shapes,
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    assert program is not None  # torch returns None without dynamo
    proto = program.model_proto
    onnx.helper.set_model_props(proto, about)
    onnx.checker.check_model(proto)
    onnx.save_model(proto, path, save_as_external_data=False)


def read_onnx(path: Path) -> Runner:
    """Return the exported network, run by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, probabilities = session.run(["logits", "probabilities"], {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(probabilities)

    return run


def write_torch_export(model: Deployable, about: dict[str, str], path: Path) -> None:
    """Write a ``torch.export`` program with the metadata as an extra file."""
    batch, shapes = _example(model, about)
    program = torch.export.export(model, (batch,), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(about, ensure_ascii=False)})


def read_torch_export(path: Path) -> Runner:
    """Return the exported program as a callable."""
    program: Runner = torch.export.load(path).module()
    return program


def write_safetensors(model: Deployable, about: dict[str, str], path: Path) -> None:
    """Write the network's weights; the metadata describes the network."""
    from safetensors.torch import save

    weights = {name: value.contiguous() for name, value in model.net.state_dict().items()}
    path.write_bytes(save(weights, metadata={**about, "format": "pt"}))


def read_safetensors(path: Path, trust: Sequence[str] = ()) -> Runner:
    """Return the network rebuilt from the file alone."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}
        weights = {f"net.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    net = load_net(about["model"], weights, about["image_size"], trust)
    scale, shift = scale_and_shift(tuple(about["mean"]), tuple(about["std"]), torch.device("cpu"))

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(images.float() * scale + shift)
        return logits, logits.softmax(1)

    return run
