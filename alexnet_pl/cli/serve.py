"""cli.serve."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.inference.trained_run import RUN_HELP, load_run
from alexnet_pl.inference.web_app import MAX_PIXELS, MAX_UPLOAD, build_page, import_gradio, launch, training_images
from alexnet_pl.runtime.errors import DataError

DESCRIPTION = f"""\
A web page on this machine: drop a picture in and see the five likeliest classes, what the first convolution answers,
and the training images with the nearest features in front of the last layer (as in figure 4 of the paper).

The page is at 127.0.0.1, so that no other machine reaches it. Uploads of more than {MAX_UPLOAD} or
{MAX_PIXELS:,} pixels and files that are no pictures are refused, and nothing is sent elsewhere."""

EPILOG = """\
It needs the extra "serve": pip install 'alexnet_pl[serve]'. Without the training data it works, but shows no
neighbours."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl serve", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--data-root", type=Path, metavar="FOLDER", help="where the training data is now")
    parser.add_argument(
        "--neighbours",
        type=int,
        default=10_000,
        metavar="N",
        help="training images to search (default: 10000; 0: none)",
    )
    given = parser.parse_args(arguments)
    import_gradio()
    run = load_run(given.run)
    training = None
    if given.neighbours > 0:
        try:
            training = training_images(run, given.neighbours, given.data_root)
        except DataError as error:
            print(f"no neighbours: {error}")
    launch(build_page(run, training), given.host, given.port)
