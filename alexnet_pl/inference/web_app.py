"""Local web page of a trained run, built with Gradio: top-5 predictions, conv1 responses, nearest training images."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from alexnet_pl.data.datamodule import plain_batches
from alexnet_pl.data.image_io import read_image
from alexnet_pl.figures.features import FeatureBank, capture_activations, extract_features
from alexnet_pl.figures.image_grids import response_grid
from alexnet_pl.inference.model_card import escape
from alexnet_pl.inference.options import MAX_PIXELS, MAX_UPLOAD
from alexnet_pl.inference.run_data import check_classes, find_data
from alexnet_pl.inference.trained_run import TrainedRun
from alexnet_pl.inference.web_guard import RequestGuard
from alexnet_pl.runtime.errors import DataError, UserError, printable

if TYPE_CHECKING:
    import gradio


UPLOADS_VARIABLE = "GRADIO_TEMP_DIR"
"""Environment variable that tells Gradio where to keep uploads."""


@dataclass(frozen=True)
class Response:
    """Response of a network to images.

    Attributes:
        probabilities: ``(N, classes)``.
        conv1: ``(N, C, H, W)``, the output of the first convolution; None without one.
        features: ``(N, F)``, the input of the last linear layer (fc8's in AlexNet: fc7 after its activation); None
            without one.
    """

    probabilities: Tensor
    conv1: Tensor | None
    features: Tensor | None


def respond(run: TrainedRun, images: Tensor) -> Response:
    """Pass normalized images ``(N, 3, S, S)`` through the network once."""
    with capture_activations(run.net) as captured:
        probabilities = run.probabilities(images)
    return Response(probabilities, captured.get("conv1"), captured.get("features"))


def training_images(run: TrainedRun, count: int, data_root: str | Path | None = None) -> FeatureBank:
    """Return ``count`` of the run's training images with their features.

    Raises:
        DataError: the data is neither at its recorded location nor in ``data_root``, or has other classes.
        UserError: the network has no linear layer.
    """
    data: Any = find_data(run, "val", data_root, run.preprocess)
    data.setup()
    check_classes(run, data)
    found = extract_features(
        run.net, plain_batches(data, data.train_dataloader()), run.preprocess.mean, run.preprocess.std, count
    )
    if found is None:
        raise UserError(f"{run.name} has no linear layer to take features from.")
    return found


def build_page(run: TrainedRun, training: FeatureBank | None) -> "gradio.Blocks":
    """Return the page, not yet served.

    Args:
        training: images to search for nearest neighbors; None shows no neighbors.
    """
    gr = import_gradio()
    names = [printable(name) for name in run.class_names]

    def answer(path: str | None) -> tuple[Any, Any, Any, Any]:
        if path is None:
            return None, None, None, []
        try:
            image = read_image(path, MAX_PIXELS)
            images = run.preprocess(image)
        except DataError as error:
            # The path on the server's disk is not the visitor's business.
            raise gr.Error(str(error).replace(str(path), "This file"), print_exception=False) from error
        image.thumbnail((1024, 1024))
        response = respond(run, images)
        probabilities = dict(zip(names, response.probabilities[0].tolist(), strict=True))
        maps = None if response.conv1 is None else enlarge(response_grid(response.conv1[0].numpy()))
        return image, probabilities, maps, [] if response.features is None else neighbors(response.features[0])

    def neighbors(features: Tensor) -> list[tuple[Image.Image, str]]:
        if training is None:
            return []
        distances, indices = training.nearest(features)
        return [
            (as_image(training.images[index]), f"{names[training.labels[index]]}, distance {distance:.1f}")
            for distance, index in zip(distances.tolist(), indices.tolist(), strict=True)
        ]

    searched = "no training data here" if training is None else f"of {len(training.labels):,} training images"
    with gr.Blocks(title=printable(run.name), analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# {escape(run.name)}\n{len(names)} classes: {escape(', '.join(names))}")
        with gr.Row():
            # Not gr.Image: it opens the file itself, with every reader that Pillow has, and fails with a traceback.
            upload = gr.File(type="filepath", file_types=["image"], label="drop an image here", elem_id="upload")
            shown = gr.Image(label="image", interactive=False, elem_id="picture")
            label = gr.Label(num_top_classes=5, label="top 5", elem_id="top")
        with gr.Row():
            conv1 = gr.Image(label="conv1 response, each map on its own scale", interactive=False, elem_id="conv1")
            gallery = gr.Gallery(label=f"nearest ({searched})", columns=3, interactive=False, elem_id="nearest")
        upload.change(answer, upload, [shown, label, conv1, gallery], api_name="predict")
    return page.queue(max_size=20)


def enlarge(gray: np.ndarray, width: int = 600) -> Image.Image:
    """Return a gray ``(H, W)`` array enlarged by a whole factor, without smoothing, to about ``width`` pixels."""
    factor = max(1, width // gray.shape[1])
    return Image.fromarray(gray.repeat(factor, 0).repeat(factor, 1))


def as_image(image: Tensor) -> Image.Image:
    """Return a ``(3, S, S)`` uint8 tensor as a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def import_gradio() -> Any:
    """Import Gradio with its telemetry off.

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


@contextmanager
def serve(run: TrainedRun, training: FeatureBank | None, host: str, port: int) -> Iterator[str]:
    """Serve the page while the context is open, and yield its address. Uploads are deleted when it closes.

    Raises:
        UserError: the port is in use, or the host is not one of this machine's.
    """
    gr = import_gradio()
    before = os.environ.get(UPLOADS_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="alexnet-serve-", ignore_cleanup_errors=True) as uploads:
        os.environ[UPLOADS_VARIABLE] = uploads
        page = build_page(run, training)
        try:
            yield _launch(gr, page, host, port, Path(uploads))
        finally:
            page.close(verbose=False)
            os.environ.pop(UPLOADS_VARIABLE)
            if before is not None:
                os.environ[UPLOADS_VARIABLE] = before


def _launch(gr: Any, page: Any, host: str, port: int, uploads: Path) -> str:
    """Start the server in a thread of its own and return its address."""
    from starlette.middleware import Middleware

    system = ("system-ui", "sans-serif")  # Gradio's own themes fetch fonts from the web
    guard = Middleware(RequestGuard, host=host, uploads=uploads)
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, max_file_size=MAX_UPLOAD, prevent_thread_lock=True,
            quiet=True, ssr_mode=False, footer_links=[], theme=gr.themes.Base(font=system, font_mono=("monospace",)),
            app_kwargs={"middleware": [guard]},
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be used ({error}). Try another --port.") from error
    return str(address)
