"""TensorBoard on a study of digits and the report of a run, as a person sees them in headless Chromium.

The screenshots are kept in browser-screenshots/.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import BROWSERS, REPOSITORY, train

from alexnet_pl.figures.run_figures import DRAWN_BY, TITLES
from alexnet_pl.runtime.run_folder import finished_result

pytestmark = pytest.mark.browser

SHOTS = REPOSITORY / "browser-screenshots"
WAIT = 60_000
"""Milliseconds. The machine may be busy, and TensorBoard reads its files in the background."""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Train LeNet-5 twice with different pooling, long enough to learn something."""
    folder = tmp_path_factory.mktemp("study") / "pooling"
    done = train("-m", "model=lenet5", "model/pool=overlapping,non_overlapping", "data=digits", "augment=crop_flip",
                 "trainer.max_epochs=4", f"hydra.sweep.dir={folder}", figures=True, cwd=folder.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def run_with(study: Path, pool: str) -> Path:
    """Return the directory of the run with that pooling."""
    (folder,) = study.glob(f"pool_{pool}-*")
    return folder


@pytest.fixture(scope="module")
def address(study) -> Iterator[str]:
    """Start TensorBoard as ``make dashboard`` does, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "alexnet_pl", "tensorboard", str(study), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    said = server.stdout.readline()
    assert said.startswith(f"http://127.0.0.1:{port}/  shows {study}"), said
    yield said.split()[0]
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) == 0


@pytest.fixture
def tab() -> Iterator:
    """Yield a browser tab; fail the test if it contacts another machine or a script on a page fails."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, BROWSERS)))
    SHOTS.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1900, "height": 1100})
        asked, failed = set(), []
        page.on("request", lambda request: asked.add(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.set_default_timeout(WAIT)
        yield page
        browser.close()
    elsewhere = [url for url in asked if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:|file:)", url)]
    assert not elsewhere
    assert not failed


def go(tab, address: str, page: str) -> None:
    tab.goto(f"{address}?darkMode=false#{page}")
    tab.reload()  # a change of the fragment alone loads nothing


def assert_drawn(locator, width: float = 100, height: float = 50) -> None:
    """Check that an element has at least this size on the page, in pixels."""
    box = locator.bounding_box()
    assert box is not None
    assert box["width"] >= width, box
    assert box["height"] >= height, box


def lines(chart) -> int:
    """Return the number of curves in a chart: paths that extend over it."""
    return chart.locator("svg path").evaluate_all(
        "paths => paths.filter(path => /M.*L/.test(path.getAttribute('d') || '') && path.getBBox().width > 50).length"
    )


def natural_sizes(images) -> list[tuple[int, int]]:
    return images.evaluate_all("images => images.map(image => [image.naturalWidth, image.naturalHeight])")


def test_scalars_are_charts_with_curves(tab, address):
    go(tab, address, "scalars")
    tab.locator("tf-tag-filterer input").first.fill("^(train|val)/(loss|acc)$|^(lr|grad_norm|weight_norm)$")
    tags = ["grad_norm", "lr", "train/acc", "train/loss", "val/acc", "val/loss", "weight_norm"]
    cards = tab.locator("tf-scalar-card")
    wait_until(
        tab, lambda: cards.evaluate_all("cards => cards.map(card => card.tag)")[:7] == tags, "the charts asked for"
    )
    for index, tag in enumerate(tags):
        chart = cards.nth(index).locator("vz-line-chart2")
        chart.scroll_into_view_if_needed()
        assert_drawn(chart)
        wait_until(tab, lambda chart=chart: lines(chart) >= 2, f"a curve of {tag} for each run")
    tab.screenshot(path=SHOTS / "scalars.png")


def test_training_and_validation_share_a_chart(tab, address):
    from playwright.sync_api import expect

    go(tab, address, "custom_scalars")
    cards = tab.locator("tf-custom-scalar-multi-line-chart-card")
    expect(cards).to_have_count(11, timeout=WAIT)
    for title, least in (("loss (nats)", 4), ("top-1 accuracy", 4), ("top-5 error", 4), ("weight norm", 2)):
        card = cards.filter(has=tab.get_by_text(title, exact=True))
        expect(card).to_have_count(1)
        card.scroll_into_view_if_needed()
        assert_drawn(card.locator("vz-line-chart2"))
        wait_until(tab, lambda card=card, least=least: lines(card) >= least, title)
    cards.first.scroll_into_view_if_needed()
    tab.screenshot(path=SHOTS / "custom_scalars.png")


def test_images_are_the_figures_of_both_runs(tab, address):
    from playwright.sync_api import expect

    go(tab, address, "images")
    images = tab.locator("tf-image-loader img")
    expect(images).to_have_count(2 * len(DRAWN_BY), timeout=WAIT)
    wait_until(tab, lambda: all(width > 100 for width, _ in natural_sizes(images)), "all images to load")
    for name in DRAWN_BY:
        loaders = tab.locator("tf-image-loader").filter(has=tab.get_by_text(f"figures/{name}"))
        expect(loaders).to_have_count(2)
        assert_drawn(loaders.first.locator("img"), height=20)
    tab.screenshot(path=SHOTS / "images.png")


def test_hparams_have_one_row_per_run_of_the_study(tab, address, study):
    from playwright.sync_api import expect

    go(tab, address, "hparams")
    table = tab.locator("tf-hparams-table-view vaadin-grid")
    expect(table).to_be_visible(timeout=WAIT)
    cells = tab.locator("vaadin-grid-cell-content")
    for option, pool in (("overlapping", "OverlappingMaxPool2d"), ("non_overlapping", "NonOverlappingMaxPool2d")):
        folder = run_with(study, option)
        result = finished_result(folder)
        for text in (f"{folder.name}/tensorboard", pool, f"{result['test/acc']:.5g}"):
            cell = cells.filter(has_text=re.compile(rf"^\s*{re.escape(text)}\s*$")).first
            expect(cell).to_be_visible(timeout=WAIT)
            assert_drawn(cell, width=20, height=10)
    for column in ("model.pool", "model", "hp/val_acc_best", "hp/test_acc", "hp/seconds"):
        expect(cells.filter(has_text=re.compile(rf"^\s*{column}\s*$")).first).to_be_visible()
    assert not cells.filter(has_text="hp_metric").count()
    tab.screenshot(path=SHOTS / "hparams.png")


def test_the_projector_shows_features_as_thumbnails(tab, address):
    from playwright.sync_api import expect

    sprites = []
    tab.on("response", lambda answer: sprites.append(answer.status) if "sprite_image" in answer.url else None)
    go(tab, address, "projector")
    frame = tab.frame_locator("iframe").frame_locator("iframe")
    expect(frame.get_by_text(re.compile(r"Points:\s*300")).first).to_be_visible(timeout=WAIT)
    assert_drawn(frame.locator("vz-projector canvas").first, 400, 400)
    wait_until(tab, lambda: sprites == [200], "the thumbnails to load")
    tab.wait_for_timeout(3000)  # for the animation that moves the points into place
    tab.screenshot(path=SHOTS / "projector.png")


def test_the_other_pages_are_not_empty(tab, address):
    from playwright.sync_api import expect

    for page, shown in (
        ("pr_curves", "tag: precision_recall/0"),
        ("histograms", "activations/act1"),
        ("text", "command/text_summary"),
    ):
        go(tab, address, page)
        expect(tab.get_by_text(shown).first).to_be_visible(timeout=WAIT)
        tab.wait_for_timeout(1000)
        tab.screenshot(path=SHOTS / f"{page}.png")
    go(tab, address, "graphs")
    boxes = tab.locator("tf-graph-scene text").filter(has_text="LeNet5")
    wait_until(tab, lambda: any((box.bounding_box() or {}).get("width", 0) > 20 for box in boxes.all()), "the graph")
    tab.screenshot(path=SHOTS / "graphs.png")


def test_the_report_opens_from_disk_without_a_network(tab, study):
    tab.context.set_offline(True)
    folder = run_with(study, "non_overlapping")
    tab.goto((folder / "report.html").as_uri())
    images = tab.locator("figure img")
    assert images.count() == len(TITLES)
    for index, title in enumerate(TITLES.values()):
        assert_drawn(images.nth(index), 300, 60)
        assert tab.locator("figcaption").nth(index).inner_text() == title
    assert all(width > 300 for width, _ in natural_sizes(images))
    result = finished_result(folder)
    assert f"{result['test/acc']:.4f}" in tab.locator("table").first.inner_text()
    widest = tab.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widest[0] <= widest[1]  # no horizontal scrolling
    tab.screenshot(path=SHOTS / "report.png", full_page=True)


def wait_until(tab, holds, what: str) -> None:
    """Wait for ``holds()``, at most a minute."""
    for _ in range(WAIT // 250):
        if holds():
            return
        tab.wait_for_timeout(250)
    pytest.fail(f"waited {WAIT // 1000} s for {what}")
