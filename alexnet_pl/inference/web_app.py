"""A local web page for a trained run: ``python -m alexnet_pl serve RUN``; see ``--help``."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from alexnet_pl.data.datamodule import plain_batches
from alexnet_pl.data.image_io import read_picture
from alexnet_pl.figures.features import FeatureBank, capture_activations, extract_features
from alexnet_pl.figures.image_grids import response_grid
from alexnet_pl.inference.evaluation import find_data
from alexnet_pl.inference.trained_run import TrainedRun
from alexnet_pl.runtime.errors import DataError, UserError

if TYPE_CHECKING:
    import gradio


MAX_UPLOAD = "10mb"

MAX_PIXELS = 40_000_000
"""Largest picture that a visitor may have decoded."""


@dataclass(frozen=True)
class Response:
    """What a network does with images.

    Attributes:
        probabilities: ``(N, classes)``.
        conv1: ``(N, C, H, W)``, the output of the first convolution.
        features: ``(N, F)``, the input of the last linear layer (fc8's in AlexNet: fc7 after its activation).
    """

    probabilities: Tensor
    conv1: Tensor
    features: Tensor


def respond(run: TrainedRun, images: Tensor) -> Response:
    """One pass of normalised images ``(N, 3, S, S)`` through the network.

    Raises:
        UserError: the network has no convolution or no linear layer.
    """
    with capture_activations(run.net) as seen:
        probabilities = run.probabilities(images)
    if len(seen) < 2:
        raise UserError(f"{run.name} has no convolution or no linear layer to show.")
    return Response(probabilities, seen["conv1"], seen["features"])


def training_images(run: TrainedRun, count: int, data_root: Path | None = None) -> FeatureBank:
    """``count`` of the run's training images with their features.

    Raises:
        DataError: the data is not where the run had it, or not in ``data_root``.
    """
    data = find_data(run, "val", data_root, run.preprocess)
    data.setup()
    found = extract_features(
        run.net, plain_batches(data, data.train_dataloader()), run.preprocess.mean, run.preprocess.std, count
    )
    if found is None:
        raise UserError(f"{run.name} has no linear layer to take features from.")
    return found


def build_page(run: TrainedRun, training: FeatureBank | None) -> "gradio.Blocks":
    """The page, not yet served."""
    gr = import_gradio()

    def answer(path: str | None) -> tuple[Any, Any, Any, Any]:
        if path is None:
            return None, None, None, []
        try:
            picture = read_picture(path, MAX_PIXELS)
            images = run.preprocess(picture)
        except DataError as error:
            # Not the path: it is of the server's disk.
            raise gr.Error(str(error).replace(str(path), "This file"), print_exception=False) from error
        response = respond(run, images)
        probabilities = dict(zip(run.class_names, response.probabilities[0].tolist(), strict=True))
        maps = enlarged(response_grid(response.conv1[0].numpy()))
        return picture, probabilities, maps, neighbours(response.features[0])

    def neighbours(features: Tensor) -> list[tuple[Image.Image, str]]:
        if training is None:
            return []
        distances, places = training.nearest(features)
        return [
            (as_picture(training.images[place]), f"{run.class_names[training.labels[place]]}, distance {distance:.1f}")
            for distance, place in zip(distances.tolist(), places.tolist(), strict=True)
        ]

    searched = "no training data here" if training is None else f"of {len(training.labels):,} training images"
    with gr.Blocks(title=run.name, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# {run.name}\n{len(run.class_names)} classes: {', '.join(run.class_names)}")
        with gr.Row():
            # Not gr.Image: it opens the file itself, with every reader that Pillow has, and fails with a traceback.
            upload = gr.File(type="filepath", file_types=["image"], label="drop a picture here", elem_id="upload")
            shown = gr.Image(label="picture", interactive=False, elem_id="picture")
            label = gr.Label(num_top_classes=5, label="top 5", elem_id="top")
        with gr.Row():
            conv1 = gr.Image(label="conv1 response, each map on its own scale", interactive=False, elem_id="conv1")
            gallery = gr.Gallery(label=f"nearest ({searched})", columns=3, interactive=False, elem_id="nearest")
        upload.change(answer, upload, [shown, label, conv1, gallery], api_name="predict")
    return page


def enlarged(grey: np.ndarray, width: int = 600) -> Image.Image:
    """Blown up in whole steps without smoothing, to about ``width`` pixels."""
    factor = max(1, width // grey.shape[1])
    return Image.fromarray(grey.repeat(factor, 0).repeat(factor, 1))


def as_picture(image: Tensor) -> Image.Image:
    """A ``(3, S, S)`` uint8 tensor as a picture."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def import_gradio() -> Any:
    """Gradio, told to keep to itself.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise UserError("The page needs Gradio: pip install 'alexnet_pl[serve]'.") from error
    return gradio


def launch(page: "gradio.Blocks", host: str, port: int, block: bool = True) -> str:
    """Serve the page, until Ctrl-C where ``block``.

    Returns:
        Its address.

    Raises:
        UserError: the port is taken, or the host is not one of this machine's.
    """
    gr = import_gradio()
    system = ("system-ui", "sans-serif")  # Gradio's own themes fetch fonts from the web
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, max_file_size=MAX_UPLOAD, prevent_thread_lock=True,
            quiet=True, ssr_mode=False, footer_links=[], theme=gr.themes.Base(font=system, font_mono=("monospace",)),
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be used ({error}). Try another --port.") from error
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return address
