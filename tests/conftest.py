"""Shared fixtures: small CIFAR-10 datasets, a download server, a private cache directory."""

import http.server
import importlib.util
import os
import pickle
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from helpers import BROWSERS, REPOSITORY, SHORT_RUN, ClassFolderMaker, OfficialArchive, config
from PIL import Image
from torchvision.datasets import CIFAR10

from alexnet_pl.config.resolvers import register_resolvers
from alexnet_pl.data.cifar10 import CLASS_NAMES
from alexnet_pl.training.run import run

register_resolvers()


@pytest.fixture(scope="session", autouse=True)
def _usual_signals() -> None:
    """Undo what nohup and shells in the background pass on: runs leave ignored signals ignored, and tests send them."""
    for name, usual in (
        ("SIGINT", signal.default_int_handler),
        ("SIGHUP", signal.SIG_DFL),
        ("SIGQUIT", signal.SIG_DFL),
    ):
        number = getattr(signal, name, None)  # Windows lacks some
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="session", autouse=True)
def _outside_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the image cache out of the home directory, and the user's settings and CIFAR-10 out of the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a number of threads that follows the load would change last digits
    os.environ.pop("ALEXNET_PL_CONF", None)
    os.environ.pop("CIFAR10_ROOT", None)


def pytest_report_header() -> list[str]:
    """Say that settings of this machine apply to the tests that run ``alexnet train`` in a process of its own."""
    path = REPOSITORY / "conf" / "local" / "default.yaml"
    return [f"{path} applies: a test that fails may pass without it"] if path.exists() else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of browsers and trackers, naming what they lack, unless ``-m`` selects them."""
    for item in items:
        if item.get_closest_marker("trackers") and "trackers" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="run by make test-trackers"))
    if "browser" in config.option.markexpr:
        return
    missing = [] if any(map(shutil.which, BROWSERS)) else ["Chromium"]
    missing += [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    reason = f"{', '.join(missing)} missing: make test-browser installs it" if missing else "run by make test-browser"
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains overrides to the end, once per process, and returns the run directory to read."""

    @cache
    def train(*overrides: str) -> Path:
        run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
        run(config(*overrides, run_dir=run_dir))
        return run_dir

    return train


@pytest.fixture
def class_folders(tmp_path: Path) -> ClassFolderMaker:
    """Return a function that creates CIFAR-10 as class folders: noise around a brightness that identifies the class."""

    def make(train_per_class: int = 10, test_per_class: int = 2, suffix: str = "png") -> Path:
        root = tmp_path / "cifar10"
        random = np.random.default_rng(0)
        for split, count in (("train", train_per_class), ("test", test_per_class)):
            for label, name in enumerate(CLASS_NAMES):
                directory = root / split / name
                directory.mkdir(parents=True)
                for index in range(count):
                    pixels = random.integers(label * 20, label * 20 + 40, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(directory / f"{index:04}.{suffix}")
        return root

    return make


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OfficialArchive]:
    """Serve a CIFAR-10 archive of 100 + 20 images, with torchvision's URL and MD5 sums patched to it."""
    source = tmp_path / "source" / CIFAR10.base_folder
    source.mkdir(parents=True)
    random = np.random.default_rng(0)
    sums = {}
    for name, count in [*((f"data_batch_{i}", 20) for i in range(1, 6)), ("test_batch", 20)]:
        batch = {"data": random.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [*range(10)] * (count // 10)}
        (source / name).write_bytes(pickle.dumps(batch))
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASS_NAMES)}))
    for path in source.iterdir():
        sums[path.name] = md5(path.read_bytes()).hexdigest()
    served = tmp_path / "served"
    served.mkdir()
    archive = served / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, CIFAR10.base_folder)

    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=served)

        def do_GET(self) -> None:
            requests.append(self.path)
            time.sleep(0.5)  # long enough for a second process to ask as well
            with suppress(ConnectionError):  # torchvision looks for a redirect first and hangs up
                super().do_GET()

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive.read_bytes()).hexdigest())
    for listing in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, listing, [[name, sums[name]] for name, _ in getattr(CIFAR10, listing)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    yield OfficialArchive(archive, requests)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def drawn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of LeNet-5 on digits after two short epochs, with all figures and histograms. Do not change it."""
    run_dir = tmp_path_factory.mktemp("drawn") / "run"
    overrides = ("callbacks.dashboard.histogram_every_n_epochs=1", "callbacks.resume.keep=true")
    run(config(*SHORT_RUN, *overrides, run_dir=run_dir, figures=True))
    return run_dir


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A local web server; yields its address and the paths that were requested so far."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()
