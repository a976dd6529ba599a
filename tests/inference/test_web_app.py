"""The page of alexnet_pl.serve: what it shows, and the real thing in headless Chromium."""

import shutil

import numpy as np
import pytest
import torch
from helpers import BROWSERS, config
from PIL import Image

from alexnet_pl.figures.image_grids import response_grid
from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.inference.web_app import MAX_PIXELS, build_page, launch, respond, training_images
from alexnet_pl.training.run import run as train_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "run"
    train_run(config("model=lenet5", "trainer=smoke", "trainer.precision=32-true", run_dir=folder))
    return load_run(folder)


def test_the_response_is_the_networks_own_arithmetic(trained):
    images = torch.randn(3, 3, 32, 32)
    response = respond(trained, images)
    with torch.no_grad():
        assert torch.equal(response.conv1, trained.net.features.conv1(images))
        hidden = trained.net.classifier[:-1](trained.net.features(images))
        assert torch.equal(response.features, hidden)
    assert torch.allclose(response.probabilities.sum(1), torch.ones(3))


def test_a_training_image_is_its_own_nearest_neighbour(trained):
    training = training_images(trained, 100)
    for place in (0, 17, 99):
        distances, places = training.nearest(training.features[place])
        assert distances[0] == 0
        expected = np.linalg.norm(training.features.numpy() - training.features[place].numpy(), axis=1)
        assert np.allclose(distances, np.sort(expected)[:6], rtol=1e-5)
        assert expected[places[0]] == 0


def test_maps_lie_side_by_side_each_on_its_own_scale():
    maps = np.stack([np.array([[0.0, 1.0]]), np.array([[5.0, 7.0]]), np.zeros((1, 2))])
    grid = response_grid(maps)
    assert grid.shape == (5, 7)
    assert grid[1, 1:3].tolist() == grid[1, 4:6].tolist() == [0, 255]
    assert grid[3, 1:3].tolist() == [0, 0]


@pytest.mark.browser
def test_a_picture_is_dropped_in_and_others_are_refused(trained, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    chromium = next(filter(None, map(shutil.which, BROWSERS)))
    training = training_images(trained, 50)
    address = launch(page := build_page(trained, training), "127.0.0.1", 7893, block=False)
    assert address.startswith("http://127.0.0.1:")
    digit = Image.fromarray(training.images[7].permute(1, 2, 0).numpy())
    digit.save(tmp_path / "digit.png")
    (tmp_path / "fake.png").write_text("no picture")
    Image.new("1", (MAX_PIXELS // 5000 + 1, 5000)).save(tmp_path / "huge.png")
    (tmp_path / "heavy.png").write_bytes(bytes(11_000_000))
    with sync_playwright() as driver:
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
        probabilities = trained.probabilities(trained.preprocess(digit))[0]
        expect(tab.locator("#top h2, #top .output-class").first).to_contain_text(str(int(probabilities.argmax())))
        expect(tab.locator("#nearest")).to_contain_text("distance 0.0")
        for name, message in (("fake.png", "is no picture"), ("huge.png", "40,000,000"), ("heavy.png", "size")):
            upload(name)
            expect(tab.locator("body")).to_contain_text(message, timeout=30_000)
        browser.close()
    page.close()
    assert {host for host in hosts if host} == {address.split("/")[2]}
