"""Checkpoints under faults: killed processes, full disks, corrupt and malicious files, foreign directories."""

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import BEST, LATEST, PREVIOUS, latest_valid, read_checkpoint, write_checkpoint

from .processes import DIGITS, Run, wait_for

EVERY_STEP = "callbacks.resume.interval_minutes=0"


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run_dir / "checkpoints" / LATEST)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    theirs = weights(other)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(one).items())


def wait_for_save(run: Run) -> None:
    """Wait until ``run`` has replaced latest.ckpt. Only the time stamp is read, because the run keeps writing."""
    latest = run.run_dir / "checkpoints" / LATEST

    def stamp() -> int | None:
        try:
            return latest.stat().st_mtime_ns
        except FileNotFoundError:  # there is none yet, or it is being replaced
            return None

    before = stamp()
    wait_for(lambda: stamp() not in (None, before), run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, never to be written to."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert Run(*DIGITS, "trainer.max_epochs=3", run_dir=run_dir).wait() == 0
    return run_dir


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """That run as it was before it wrote its result: latest.ckpt of epoch 3, previous.ckpt of epoch 2."""
    run_dir = tmp_path / "stopped"
    shutil.copytree(finished, run_dir)
    (run_dir / "result.json").unlink()
    return run_dir


@pytest.mark.fault("SIGKILL at 20 random moments", "latest.ckpt loads, at most one interval is lost, same result")
def test_killed_twenty_times(tmp_path):
    settings = (*DIGITS, "trainer.max_epochs=14", EVERY_STEP)
    whole = Run(*settings, run_dir=tmp_path / "whole")
    assert whole.wait() == 0
    moments = random.Random(0)
    run_dir, kills, step = tmp_path / "killed", 0, -1  # the first checkpoint is of step 0
    while kills < 20 and finished_result(run_dir) is None:
        run = Run(*(["resume=here"] if (run_dir / "config.yaml").exists() else settings), run_dir=run_dir)
        before = step
        wait_for_save(run)
        time.sleep(moments.uniform(0, 0.1))  # short, so that the run is not finished before the last kill
        run.process.kill()
        run.process.join()
        kills += 1
        path, checkpoint = latest_valid(run_dir / "checkpoints")
        step = checkpoint["position"]["step"]
        assert step > before, f"{path.name} did not move on"
        metrics = run_dir / "metrics.csv"
        epochs_seen = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0
        assert step >= 20 * epochs_seen - 1, "more than one interval is lost"
    assert kills == 20
    if finished_result(run_dir) is None:
        assert Run("resume=here", run_dir=run_dir).wait() == 0
    assert_same_weights(run_dir, tmp_path / "whole")
    for key in ("val/acc", "val/loss", "test/acc", "test/loss", "best_epoch"):
        assert finished_result(run_dir)[key] == finished_result(tmp_path / "whole")[key]


@pytest.mark.fault("SIGKILL during a save", "the checkpoint before it is intact")
def test_killed_while_saving(tmp_path):
    run_dir = tmp_path / "run"
    folder = run_dir / "checkpoints"
    wide = ("data=digits", "model=alexnet_bn", "trainer.accelerator=cpu", "trainer.limit_train_batches=2", EVERY_STEP)
    run = Run(*wide, run_dir=run_dir)  # 260 MB a checkpoint: the scratch file is there for a while
    for _ in range(3):
        wait_for(lambda: (folder / f".{LATEST}.part").exists() and (folder / PREVIOUS).exists(), run)
        run.process.kill()
        run.process.join()
        found = latest_valid(folder)
        assert found is not None
        assert found[0].name in (LATEST, PREVIOUS)
        run = Run("resume=here", run_dir=run_dir)
        wait_for(lambda run=run: "continues" in run.text, run)
    run.process.kill()
    run.process.join()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.fault("full disk while saving", "exit 1, one line, the previous checkpoint is intact and can be resumed")
@pytest.mark.parametrize("temporary", ["same", "other"])
def test_a_full_disk(small_disk, tmp_path, monkeypatch, temporary):
    monkeypatch.setenv("TMPDIR", str(small_disk if temporary == "same" else tmp_path))
    run_dir = small_disk / "run"
    run = Run(*DIGITS, "trainer.max_epochs=30", EVERY_STEP, run_dir=run_dir)
    wait_for(lambda: (run_dir / "checkpoints" / PREVIOUS).exists(), run)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    assert run.wait() == 1
    assert len(run.errors) == 1, run.text
    assert "Traceback" not in run.text
    assert "No space left" in run.errors[0] or "could not be written" in run.errors[0]
    _, checkpoint = latest_valid(run_dir / "checkpoints")
    (small_disk / "filler").unlink(missing_ok=True)
    again = Run("resume=here", run_dir=run_dir)
    wait_for(
        lambda: latest_valid(run_dir / "checkpoints")[1]["position"]["step"] > checkpoint["position"]["step"], again
    )
    again.process.kill()
    again.process.join()


@pytest.mark.fault("read-only directory", "refused before any data is read, exit 2")
def test_a_read_only_directory(small_disk, tmp_path):
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (tmp_path / "link").symlink_to(small_disk / "run")  # the output file lies beside it, where it can be written
    run = Run(*DIGITS, run_dir=tmp_path / "link")
    assert run.wait() == 2
    assert f"error: {tmp_path}/link cannot be written (Read-only file system)" in run.text
    assert "handwritten digits" not in run.text


@pytest.mark.fault("truncated, empty or text checkpoint", "falls back to previous.ckpt with a warning, same result")
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "one bit"])
def test_a_corrupt_checkpoint(damage, stopped, finished):
    latest = stopped / "checkpoints" / LATEST
    whole = latest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    content = {"truncated": whole[:1000], "empty": b"", "text": b"not a checkpoint\n", "one bit": flipped}
    latest.write_bytes(content[damage])
    run = Run("resume=here", run_dir=stopped)
    assert run.wait() == 0, run.text
    assert "warning: " in run.text
    assert "latest.ckpt is corrupt" in run.text
    assert "from previous.ckpt: continues after epoch 2" in run.text
    assert_same_weights(stopped, finished)


@pytest.mark.fault("both resume checkpoints corrupt", "one line, exit 1")
def test_no_valid_checkpoint(stopped):
    for name in (LATEST, PREVIOUS):
        (stopped / "checkpoints" / name).write_bytes(b"PK\x03\x04")
    run = Run("resume=here", run_dir=stopped)
    assert run.wait() == 1
    assert len(run.errors) == 1
    assert "Traceback" not in run.text


class _Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.security
@pytest.mark.fault("malicious pickle as checkpoint", "refused, its payload does not run")
@pytest.mark.parametrize("writer", ["pickle", "torch"])
@pytest.mark.parametrize("flag", ["resume", "init_from"])
def test_a_malicious_checkpoint(writer, flag, stopped, tmp_path):
    marker, folder = tmp_path / "ran", stopped / "checkpoints"
    for path in folder.iterdir():
        path.unlink()  # the checksums too: an attacker would write fitting ones
    for name in (BEST, LATEST):
        content = {"state_dict": {}, "position": _Payload(marker)}
        if writer == "pickle":
            (folder / name).write_bytes(pickle.dumps(content))
        else:
            torch.save(content, folder / name)
    if flag == "resume":
        run = Run("resume=here", run_dir=stopped)
    else:
        run = Run(*DIGITS, f"init_from={stopped}", run_dir=tmp_path / "new")
    assert run.wait() == 1
    assert len(run.errors) == 1
    assert not marker.exists()


@pytest.mark.fault("checkpoint of another network", "refused with the names that differ, exit 1")
def test_a_checkpoint_of_another_network(stopped):
    folder = stopped / "checkpoints"
    checkpoint = read_checkpoint(folder / LATEST)
    state = checkpoint["state_dict"]
    state["net.features.conv9.weight"] = state.pop("net.features.conv1.weight")
    state["net.classifier.fc5.bias"] = torch.zeros(7)
    write_checkpoint(checkpoint, folder / LATEST)
    run = Run("resume=here", run_dir=stopped)
    assert run.wait() == 1
    (error,) = run.errors
    assert "missing: features.conv1.weight" in error
    assert "unexpected: features.conv9.weight" in error
    assert "mis-shaped: classifier.fc5.bias (7,) instead of (10,)" in error


@pytest.mark.fault("finished run resumed", "says so, exit 0, nothing touched")
def test_a_finished_run(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    run = Run("resume=here", run_dir=finished)
    assert run.wait() == 0
    assert "has finished; there is nothing to resume" in run.text
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.fault("another process on the run directory", "refused while the first one runs, which is not disturbed")
def test_two_processes_on_a_run(tmp_path):
    settings = (*DIGITS, "trainer.max_epochs=3000")
    first = Run(*settings, run_dir=tmp_path / "run")
    wait_for(lambda: "epoch" in first.text, first)
    second = Run("resume=here", run_dir=tmp_path / "run")
    assert second.wait() == 2
    assert "is in use by another process" in second.text
    first.send(signal.SIGTERM)
    assert first.wait() == 143


@pytest.mark.fault("SIGKILL between result.json and report.html", "resume writes the report and removes what is left")
def test_killed_before_the_report(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    config = run_dir / "config.yaml"
    config.write_text(
        config.read_text().replace("figures: false", "figures: true").replace("keep: true", "keep: false")
    )
    run = Run("resume=here", run_dir=run_dir)
    assert run.wait() == 0, run.text
    assert (run_dir / "report.html").is_file()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["SHA256SUMS", BEST]


@pytest.mark.fault(
    "resume of a stranger's run directory", "output paths are the directory's own; links out are refused"
)
@pytest.mark.parametrize("way", ["path", "link"])
def test_a_foreign_run_directory(way, stopped, tmp_path):
    victim = tmp_path / "bashrc"
    victim.write_text("mine")
    config = stopped / "config.yaml"
    if way == "path":
        config.write_text(re.sub(r"path: .*metrics.csv", f"path: {victim}", config.read_text()))
    else:
        (stopped / "metrics.csv").unlink()
        (stopped / "metrics.csv").symlink_to(victim)
    run = Run("resume=here", run_dir=stopped)
    assert run.wait() == (0 if way == "path" else 2), run.text
    assert victim.read_text() == "mine"


BOMBS = {
    "model.num_classes": (10**9, "model is refused: a tensor has 320,435 MiB."),
    "model.activation": (
        {"_target_": "torch.nn.ZeroPad2d", "padding": 5000, "_partial_": True},
        "model.activation._target_=torch.nn.ZeroPad2d is refused",
    ),
    "augment": (
        {"_target_": "torch.nn.Upsample", "scale_factor": 999},
        "augment._target_=torch.nn.Upsample is refused",
    ),
    "data.resize_size": (10**5, "data.resize_size=100000 is invalid: expected an integer from 1 to 4096"),
    "trainer.devices": (10**5, "trainer.devices=100000 is invalid: expected at most "),
}


@pytest.mark.security
@pytest.mark.fault("config that would take all memory or processes", "refused before any is taken, exit 2")
@pytest.mark.parametrize("key", BOMBS)
def test_a_config_bomb(key, stopped):
    value, message = BOMBS[key]
    config = OmegaConf.load(stopped / "config.yaml")
    OmegaConf.update(config, key, value, merge=False)
    OmegaConf.save(config, stopped / "config.yaml")
    run = Run("resume=here", run_dir=stopped, memory=2**31)
    assert run.wait() == 2, run.text
    assert run.errors[0].startswith(f"error: {message}")


@pytest.mark.fault("checkpoint that unpacks to gigabytes", "refused before it is read, exit 1")
def test_a_checkpoint_bomb(stopped):
    folder = stopped / "checkpoints"
    (folder / "SHA256SUMS").unlink()
    (folder / PREVIOUS).unlink()
    torch.save({"state_dict": {"net.weight": torch.zeros(50_000_000)}}, folder / LATEST)
    with zipfile.ZipFile(folder / LATEST) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / LATEST, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    run = Run("resume=here", run_dir=stopped)
    assert run.wait() == 1
    assert "its archive has compressed entries" in run.text


@pytest.mark.fault("SHA256SUMS that does not list a checkpoint", "one line, exit 1")
def test_random_sums(stopped):
    (stopped / "checkpoints" / "SHA256SUMS").write_bytes(bytes(range(256)))
    run = Run("resume=here", run_dir=stopped)
    assert run.wait() == 1
    assert "is not listed in" in run.text
