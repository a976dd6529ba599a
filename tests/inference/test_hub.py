"""Sharing over a local stand-in for the Hugging Face Hub, with the hub's own client."""

import base64
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from alexnet_pl import load_run
from alexnet_pl.cli import evaluate, push
from alexnet_pl.inference import hub
from alexnet_pl.runtime.errors import UserError


@dataclass
class Hub:
    """Repositories of a stand-in hub: ``user/name`` → file name → content; and the requests that came."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://user", "hf://user/../x", "hf://a/b/c", "hf://user/name@", "hf://us er/name", "hf://-u/n"]
)
def test_an_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"is invalid\. Expected hf://USER/NAME"):
        load_run(address)


def test_addresses() -> None:
    assert hub.parse_address("hf://user/alexnet-1.0") == ("user/alexnet-1.0", None)
    assert hub.parse_address("hf://user/alexnet@v1") == ("user/alexnet", "v1")
    assert not hub.is_hub_address("runs/a")


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs the package huggingface_hub: pip install 'alexnet_pl\[hub\]'"):
        load_run("hf://user/name")


def test_nothing_of_this_machine_is_shared() -> None:
    config = {
        "model": {},
        "data": {"root": "/home/me", "shards": "/s", "augment": {"_target_": "x"}, "batch_size": 2},
        "trainer": {"precision": "32-true", "default_root_dir": "/home/me/run"},
        "run_dir": "/home/me/run",
        "callbacks": {"best": {"folder": "/home/me"}}, "logger": {}, "seed": 1,
    }  # fmt: skip
    result = {"test/acc": 0.5, "data": {"name": "cifar10", "source": "class folders (jpg) in /home/me/cifar10"}}
    shared = hub.shared_config(config, {"epoch": 3, "result": result})
    assert "/home" not in json.dumps(shared)
    assert shared["config"]["trainer"] == {"precision": "32-true"}
    assert shared["config"]["data"] == {"root": "data", "batch_size": 2}
    assert shared["result"]["data"]["source"] == "class folders (jpg)"


@pytest.mark.security
@pytest.mark.parametrize("tag", ["../../evil", "/etc/evil", "..", "", "a\x1b", "a" * 200, "a\n"])
def test_a_tag_that_would_leave_the_cache_is_refused(tag: str) -> None:
    hub.check_tag("0123456789abcdef" * 4)
    with pytest.raises(UserError, match="ETag .* is refused"):
        hub.check_tag(tag)


# --- with the hub's client ------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a hub that accepts commits with the right token and serves files."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="make test-trackers installs it")
    found = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_POST(self) -> None:
            found.requests.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != "Bearer hf_right":
                return self.reply(b'{"error": "Invalid credentials"}', 401)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization', 'user')}/{asked['name']}"
                found.repositories.setdefault(name, {})
                return self.reply(json.dumps({"url": f"{found.url}/{name}"}).encode())
            if self.path == "/api/validate-yaml":
                return self.reply(b'{"errors": [], "warnings": []}')
            if "/preupload/" in self.path:
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
                return self.reply(json.dumps({"files": modes}).encode())
            name = re.match("/api/models/(.*)/commit/main", self.path)[1]
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    found.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commit = {"commitUrl": f"{found.url}/{name}/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
            return self.reply(json.dumps(commit).encode())

        def do_HEAD(self) -> None:
            found.requests.append(f"{self.command} {self.path}")
            asked = re.fullmatch("/([^/]*/[^/]*)/resolve/([^/]*)/(.*)", self.path)
            files = found.repositories.get(asked[1]) if asked else None
            if files is None:
                return self.reply(b"", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
            if asked[3] not in files:
                return self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            content = files[asked[3]]
            etag = hashlib.sha256(content).hexdigest()
            return self.reply(content, ETag=f'"{etag}"', X_Repo_Commit="a" * 40)

        do_GET = do_HEAD

        def log_message(self, *arguments: object) -> None:
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield found
    served.shutdown()
    served.server_close()


def test_a_pushed_run_is_the_same_run(server: Hub, drawn_run: Path, capsys) -> None:
    push.main([str(drawn_run), "hf://user/lenet"])
    assert capsys.readouterr().out.strip() == f"{server.url}/user/lenet"
    files = server.repositories["user/lenet"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert str(drawn_run) not in files["config.json"].decode()
    assert 'load_run("hf://user/lenet")' in files["README.md"].decode()

    here, there = load_run(drawn_run), load_run("hf://user/lenet")
    images = torch.rand(4, 3, here.preprocess.image_size, here.preprocess.image_size)
    assert torch.equal(there.probabilities(images), here.probabilities(images))
    assert (there.class_names, there.preprocess, there.epoch) == (here.class_names, here.preprocess, here.epoch)
    evaluate.main(["hf://user/lenet"])
    assert "identical to the metrics in result.json" in capsys.readouterr().out


def test_who_is_not_logged_in_is_told_how(server: Hub, drawn_run: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="was not written: .*hf auth login"):
        push.main([str(drawn_run), "hf://user/lenet"])
    assert server.repositories == {}


def test_what_is_not_there_is_named_in_one_line(server: Hub, monkeypatch) -> None:
    with pytest.raises(UserError, match="hf://user/nothing cannot be loaded: ") as refusal:
        load_run("hf://user/nothing")
    assert "\n" not in str(refusal.value)
    server.repositories["user/other"] = {"pytorch_model.bin": b""}
    with pytest.raises(UserError, match="hf://user/other cannot be loaded: "):
        load_run("hf://user/other")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hf://user/unreachable cannot be loaded: "):
        load_run("hf://user/unreachable")


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_a_server_that_does_not_answer_is_one_line(kind: str, server: Hub, drawn_run: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    push.main([str(drawn_run), "hf://user/cached"])
    load_run("hf://user/cached")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if kind == "closed":
            listening.close()
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UserError) as refused:
            load_run("hf://user/name")
        text = str(refused.value)
        assert text.startswith(f"hf://user/name cannot be loaded: {address} cannot be reached (")
        assert text.endswith("), and config.json is not in the cache.")
        assert "\n" not in text
        with pytest.raises(UserError, match=rf"hf://user/name was not written: {address} cannot be reached \(.+\)\.$"):
            push.main([str(drawn_run), "hf://user/name"])
        assert load_run("hf://user/cached").epoch == load_run(drawn_run).epoch


def test_the_command_says_so_in_one_line_as_well() -> None:
    """In a process of its own, because the hub's package imports its modules on first use."""
    pytest.importorskip("huggingface_hub", reason="make test-trackers installs it")
    command = [sys.executable, "-m", "alexnet_pl", "evaluate", "hf://user/name"]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: hf://user/name cannot be loaded: http://127.0.0.1:9 cannot be reached (")
    assert done.stderr.count("\n") == 1


def _edited(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    described = json.loads(files["config.json"])
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = described
        for parent in parents:
            node = node[parent]
        node[key] = value
    return {**files, "config.json": json.dumps(described).encode()}


@pytest.mark.security
def test_hostile_and_corrupt_repositories_are_refused(
    server: Hub, drawn_run: Path, tmp_path: Path, monkeypatch
) -> None:
    push.main([str(drawn_run), "hf://user/good"])
    good = server.repositories["user/good"]
    network = json.loads(good["config.json"])["config"]["model"]
    marker = tmp_path / "payload-ran"
    hostile = {
        "code": _edited(good, config__model={"_target_": "os.system", "command": f"touch {marker}"}),
        "factory": _edited(good, config__model={**network, "activation": {"_target_": "os.system", "command": "x"}}),
        "data": _edited(good, config__data={"_target_": "shutil.rmtree", "path": str(tmp_path)}),
        "huge": _edited(good, config__model={**network, "num_classes": 10**9}),
        "names": _edited(good, config__class_names=[1, 2]),
        "newer": _edited(good, config__version="999.0"),
        "epoch": _edited(good, epoch="three"),
        "foreign": _edited(good, format="transformers"),
        "truncated": {**good, "model.safetensors": good["model.safetensors"][:-100]},
        "pickle": {**good, "model.safetensors": b"\x80\x04\x95cos\nsystem\n."},
        "nested": {**good, "config.json": b"[" * 100_000},
        "long": {**good, "config.json": b" " * (hub.MAX_CONFIG_BYTES + 1)},
    }
    for name, files in hostile.items():
        server.repositories[f"user/{name}"] = files
        with pytest.raises(UserError, match=f"hf://user/{name}") as refusal:
            load_run(f"hf://user/{name}")
        assert "Traceback" not in str(refusal.value)
    assert not marker.exists()
    monkeypatch.setattr(hub, "MAX_WEIGHT_BYTES", 1000)
    with pytest.raises(UserError, match=r"model\.safetensors has .* bytes, above the limit of 1,000"):
        load_run("hf://user/good")
