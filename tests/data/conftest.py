"""Fixtures of the data tests: a small dataset in class folders, its shards, the same behind a web server."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import make_image_folder

from alexnet_pl.data.class_folders import list_splits
from alexnet_pl.data.shards.writer import make_shards


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return the root of class folders with 36 training and 12 validation images."""
    return make_image_folder(tmp_path / "images")


@pytest.fixture
def out(images: Path, tmp_path: Path) -> Path:
    """Return the directory of six shards of ``images``: four of training and two of validation images."""
    make_shards(list_splits(images), tmp_path / "out", 16, per_shard=9)
    return tmp_path / "out"


@pytest.fixture
def store(out: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the shards over HTTP; yield their URL and the names requested so far."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(Path(self.path).name)
            super().do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=out))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()
