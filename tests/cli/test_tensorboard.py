"""The TensorBoard command: which directories it shows, which ports it takes, and that its address answers."""

import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from alexnet_pl.cli.tensorboard import check_port, log_folders, main
from alexnet_pl.runtime.errors import UserError


@pytest.fixture
def events(tmp_path, monkeypatch):
    """Return a function that creates an event file below a directory, in an otherwise empty current directory."""
    monkeypatch.chdir(tmp_path)

    def make(name):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "events.out.tfevents.1.host").touch()
        return folder

    return make


def test_runs_and_studies_are_shown_by_default(events, tmp_path):
    with pytest.raises(UserError, match=r"^there are no runs yet\. Try: make quickstart"):
        log_folders([])
    events("runs/a/tensorboard")
    assert [str(path) for path in log_folders([])] == ["runs"]
    events("multirun/b/tensorboard")
    assert [str(path) for path in log_folders([])] == ["runs", "multirun"]
    assert log_folders([tmp_path / "runs" / "a"]) == [tmp_path / "runs" / "a"]


def test_directories_without_runs_are_refused(events, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, message in (
        ("nowhere", "nowhere not found. Give a run directory"),
        ("file", "file not found. Give a run directory"),
        ("empty", "there are no runs yet in .*empty"),
    ):
        with pytest.raises(UserError, match=message):
            log_folders([tmp_path / name])
    with pytest.raises(UserError, match="TensorBoard cannot read a path with a comma or a colon"):
        log_folders([events("lr=0.1,0.2")])


def test_a_port_in_use_or_out_of_range_is_refused(events, capsys):
    events("runs/a")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is in use.*\nTry PORT={port + 1}"):
            main(["--port", str(port)])
    for port in (0, -1, 65536):
        with pytest.raises(UserError, match=f"--port={port} is invalid: expected an integer from 1 to 65535"):
            check_port(port)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(events, tmp_path):
    events("runs/a")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "alexnet_pl", "tensorboard", "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == f"http://127.0.0.1:{port}/  shows runs  (Ctrl-C ends it)\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
            assert b"TensorBoard" in page.read()
        server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130)
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.wait()
