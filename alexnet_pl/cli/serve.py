"""Web page command: ``alexnet serve RUN``."""

from collections.abc import Sequence

from alexnet_pl.cli.parser import add_data_root, add_run, make_parser, tcp_port, wait_for_stop
from alexnet_pl.inference.options import MAX_PIXELS, MAX_UPLOAD
from alexnet_pl.runtime.errors import UserError

DESCRIPTION = f"""\
Open a local web page: drop in an image to see its top-5 predictions, the response of the first convolution, and the
training images with the nearest penultimate features (as in figure 4 of the paper).

The page is served at 127.0.0.1, which no other machine can reach, and answers only requests addressed to it by IP
address or by --host. Uploads above {MAX_UPLOAD} or {MAX_PIXELS:,} pixels and files that are not images are refused.
Uploads are deleted on exit, and nothing is sent elsewhere."""

EPILOG = """\
Needs the extra "serve": pip install 'alexnet_pl[serve]'. Without the training data the page works, but shows no
neighbors."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("serve", DESCRIPTION, EPILOG)
    add_run(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=tcp_port, default=7860, help="default: 7860")
    add_data_root(parser, "current location of the training data")
    parser.add_argument(
        "--neighbors", type=int, default=10_000, metavar="N", help="training images to search (default: 10000; 0: none)"
    )
    args = parser.parse_args(arguments)
    from alexnet_pl.inference.trained_run import load_run  # here for start-up time: --help needs no torch
    from alexnet_pl.inference.web_app import import_gradio, serve, training_images

    import_gradio()
    run = load_run(args.run, args.trust)
    training = None
    if args.neighbors > 0:
        try:
            training = training_images(run, args.neighbors, args.data_root)
        except UserError as error:  # no data, or no features
            print(f"no neighbors: {error}")
    wait = wait_for_stop()
    with serve(run, training, args.host, args.port) as address:
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        wait()
