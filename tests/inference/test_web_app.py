"""Web page of a trained run: what it computes, which requests it answers, and the page itself in headless Chromium."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import BROWSERS
from PIL import Image
from torch import nn

from alexnet_pl.figures.image_grids import response_grid
from alexnet_pl.inference.web_app import MAX_PIXELS, respond, serve, training_images
from alexnet_pl.inference.web_guard import MAX_CONCURRENT_UPLOADS, MAX_REQUEST_BYTES, RequestGuard, prune, refusal


def test_the_response_is_the_networks_own_arithmetic(run):
    images = torch.randn(3, 3, 32, 32)
    response = respond(run, images)
    with torch.no_grad():
        assert torch.equal(response.conv1, run.net.features.conv1(images))
        hidden = run.net.classifier[:-1](run.net.features(images))
        assert torch.equal(response.features, hidden)
    assert torch.allclose(response.probabilities.sum(1), torch.ones(3))


@pytest.mark.parametrize(
    ("net", "missing"),
    [
        (nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "features"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), "conv1"),
    ],
)
def test_a_network_of_the_users_own_is_shown_as_far_as_it_goes(net, missing, run):
    response = respond(replace(run, net=net.eval()), torch.randn(1, 3, 32, 32))
    assert response.probabilities.shape == (1, 10)
    assert [name for name in ("conv1", "features") if getattr(response, name) is None] == [missing]


def test_a_training_image_is_its_own_nearest_neighbor(run):
    training = training_images(run, 100)
    for index in (0, 17, 99):
        distances, indices = training.nearest(training.features[index])
        assert distances[0] == 0
        expected = np.linalg.norm(training.features.numpy() - training.features[index].numpy(), axis=1)
        assert np.allclose(distances, np.sort(expected)[:6], rtol=1e-5)
        assert expected[indices[0]] == 0


def test_feature_maps_are_tiled_each_on_its_own_scale():
    maps = np.stack([np.array([[0.0, 1.0]]), np.array([[5.0, 7.0]]), np.zeros((1, 2))])
    grid = response_grid(maps)
    assert grid.shape == (5, 7)
    assert grid[1, 1:3].tolist() == grid[1, 4:6].tolist() == [0, 255]
    assert grid[3, 1:3].tolist() == [0, 0]


# --- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.security
@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"host": "127.0.0.1:7860"}, False),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, False),
        ({"host": "[::1]:7860"}, False),
        ({"host": "192.168.1.7:7860", "origin": "http://192.168.1.7:7860"}, False),
        ({"host": "desk.example:7860"}, False),
        ({"host": "evil.example:7860"}, True),
        ({"host": "127.0.0.1.evil.example"}, True),
        ({"host": "localhost.evil.example:7860"}, True),
        ({"host": "evil.example@127.0.0.1"}, False),
        ({"host": ""}, True),
        ({}, True),
        ({"host": "[::1"}, True),
        ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, True),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8000"}, True),
        ({"host": "127.0.0.1:7860", "origin": "null"}, True),
    ],
    ids=str,
)
def test_only_the_pages_own_requests_are_answered(headers, refused):
    assert (refusal(headers, "desk.example") is not None) is refused


def ask(guard, method="POST", path="/gradio_api/upload", body=(b"",), **headers):
    """Send a request through the guard; return the status, or None if the application was reached and hung up on."""
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    sent = []

    async def receive():
        return parts.pop(0) if parts else {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()]
    asyncio.run(guard({"type": "http", "method": method, "path": path, "headers": raw}, receive, send))
    return next((message["status"] for message in sent if message["type"] == "http.response.start"), None)


async def store(scope, receive, send):
    """Read the whole body, as an application does."""
    while (message := await receive())["type"] != "http.disconnect":
        if not message["more_body"]:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            return


@pytest.mark.security
def test_uploads_are_bounded_in_size_and_number(tmp_path):
    guard = RequestGuard(store, "127.0.0.1", tmp_path)
    assert ask(guard, content_length="10") == 200
    assert ask(guard, content_length=str(MAX_REQUEST_BYTES + 1)) == 413
    assert ask(guard, content_length="many") == 400
    assert ask(guard, body=[bytes(1_000_000)] * 11) == 200
    assert ask(guard, body=[bytes(1_000_000)] * 13) is None
    assert ask(guard, path="/gradio_api/queue/join", body=[bytes(1_000_000)] * 13) is None
    assert ask(guard, method="GET", host="evil.example") == 403
    guard._running = MAX_CONCURRENT_UPLOADS
    assert ask(guard) == 429
    assert ask(guard, method="GET", path="/") == 200


@pytest.mark.security
def test_the_oldest_uploads_make_room(tmp_path):
    for index in range(5):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "upload").write_bytes(bytes(100))
        os.utime(tmp_path / str(index) / "upload", (index, index))
    prune(tmp_path, 500)
    assert len(list(tmp_path.glob("*/upload"))) == 5
    prune(tmp_path, 250)
    assert sorted(path.parent.name for path in tmp_path.glob("*/upload")) == ["3", "4"]


@pytest.mark.browser
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_the_command_refuses_strangers_and_deletes_uploads_when_it_ends(folder, tmp_path, number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "alexnet_pl", "serve", str(folder), "--port", str(port), "--neighbors", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp_path)}
    )
    assert server.stdout.readline().startswith(f"http://127.0.0.1:{port}/")

    def request(method, path, body=b"", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        given = {name.title().replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, given)
        return connection.getresponse()

    assert request("GET", "/").status == 200
    assert request("GET", "/", host="evil.example").status == 403
    assert request("GET", "/config", host=f"evil.example:{port}").status == 403
    boundary = uuid.uuid4().hex
    disposition = 'Content-Disposition: form-data; name="files"; filename="a.png"'
    form = f"--{boundary}\r\n{disposition}\r\n\r\nx\r\n--{boundary}--\r\n"
    kind = f"multipart/form-data; boundary={boundary}"
    assert request("POST", "/gradio_api/upload", form, content_type=kind, origin="http://evil.example").status == 403
    done = request("POST", "/gradio_api/upload", form, content_type=kind, origin=f"http://127.0.0.1:{port}")
    assert done.status == 200
    (path,) = json.loads(done.read())
    assert path.startswith(str(tmp_path))
    assert os.path.exists(path)
    server.send_signal(number)
    assert server.wait(timeout=120) == 0
    assert not os.path.exists(path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("alexnet-serve-")]


@pytest.mark.browser
def test_an_image_is_dropped_in_and_others_are_refused(run, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    chromium = next(filter(None, map(shutil.which, BROWSERS)))
    training = training_images(run, 50)
    digit = Image.fromarray(training.images[7].permute(1, 2, 0).numpy())
    digit.save(tmp_path / "digit.png")
    (tmp_path / "fake.png").write_text("no image")
    Image.new("1", (MAX_PIXELS // 5000 + 1, 5000)).save(tmp_path / "huge.png")
    (tmp_path / "heavy.png").write_bytes(bytes(11_000_000))
    with serve(run, training, "127.0.0.1", 7893) as address, sync_playwright() as driver:
        assert address.startswith("http://127.0.0.1:")
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        tab = browser.new_page()
        hosts = set()
        tab.on("request", lambda request: hosts.add(request.url.split("/")[2]))

        def upload(name):
            tab.goto(address)
            tab.locator("#upload input[type=file]").wait_for(state="attached")
            tab.set_input_files("#upload input[type=file]", tmp_path / name)

        upload("digit.png")
        expect(tab.locator("#nearest img")).to_have_count(6, timeout=30_000)
        expect(tab.locator("#conv1 img")).to_have_count(1)
        probabilities = run.probabilities(run.preprocess(digit))[0]
        expect(tab.locator("#top h2, #top .output-class").first).to_contain_text(str(int(probabilities.argmax())))
        expect(tab.locator("#nearest")).to_contain_text("distance 0.0")
        for name, message in (("fake.png", "is not an image"), ("huge.png", "40,000,000"), ("heavy.png", "size")):
            upload(name)
            expect(tab.locator("body")).to_contain_text(message, timeout=30_000)
        browser.close()
    assert {host for host in hosts if host} == {address.split("/")[2]}
