"""Exact resume: an interrupted run equals an uninterrupted one, bit for bit."""

import hashlib
import http.server
import os
import re
import signal
import threading
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY, assert_same_run, config, metric_rows, run_until_stopped, weights
from hydra.utils import instantiate
from omegaconf import OmegaConf

from alexnet_pl.config.resolve import resolve_auto
from alexnet_pl.data.digits import DigitsDataModule
from alexnet_pl.models.alexnet import TORCHVISION_LAYERS
from alexnet_pl.runtime.errors import ConfigError, UserError
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import CheckpointError, read_checkpoint
from alexnet_pl.training.resume import COPIES, apply_changes, diff_configs
from alexnet_pl.training.run import run
from alexnet_pl.training.weights import warm_start

# AlexNet for its dropout and augmentation for its random draws: 10 batches an epoch, three epochs.
RUN = (
    *("model=alexnet_bn", "model.channels=[4,6,8,8,6]", "model.fc_width=16"),
    *("data=digits", "data.batch_size=128", "augment=crop_flip", "scheduler.patience=0", "+scheduler.threshold=0.5"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=3"),
    "callbacks.resume.min_interval_seconds=0",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(config(*RUN, run_dir=run_dir))
    return run_dir


@pytest.mark.parametrize("step", [1, 9, 10, 17, 30])
def test_resumed_is_uninterrupted_bit_for_bit(step, uninterrupted, tmp_path, monkeypatch):
    """Stopped by a real SIGTERM in the first, a middle, the last and a first step of an epoch."""
    run_until_stopped(config(*RUN, run_dir=tmp_path / "run"), monkeypatch, step)
    assert not (tmp_path / "run" / "result.json").exists()
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_resumed_many_times_is_uninterrupted(uninterrupted, tmp_path, monkeypatch, caplog):
    run_until_stopped(config(*RUN, run_dir=tmp_path / "run"), monkeypatch, 5)
    caplog.set_level("INFO")
    for step in (3, 2, 15):  # counted from 1 in each process
        run_until_stopped(config("resume=here", run_dir=tmp_path / "run"), monkeypatch, step)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)
    started = [record.getMessage() for record in caplog.records if record.getMessage().startswith("start")]
    assert started == [
        "start   from latest.ckpt: continues inside epoch 1, after batch 5",
        "start   from latest.ckpt: continues inside epoch 1, after batch 8",
        "start   from latest.ckpt: continues after epoch 1",
        "start   from latest.ckpt: continues inside epoch 3, after batch 5",
    ]


@pytest.mark.slow
def test_a_run_with_warm_up_resumes_bit_for_bit(tmp_path, monkeypatch):
    """The paper's recipe with a larger batch, stopped on the way up, after it, and after the rate has fallen."""
    recipe = (
        *("experiment=paper_imagenet", "data=digits", "data.image_size=67", "data.resize_size=77"),
        *("model.conv1_padding=0", "model.channels=[4,6,8,8,6]", "model.fc_width=16", "model.initialization=torch"),
        *("data.batch_size=256", "scheduler.warmup_epochs=1.5", "scheduler.patience=0", "+scheduler.threshold=0.5"),
        *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=4"),
    )
    run(config(*recipe, run_dir=tmp_path / "whole"))
    assert [float(row["lr"]) for row in metric_rows(tmp_path / "whole")] == pytest.approx(
        [0.01 + 0.01 * 4 / 7.5, 0.02, 0.02, 0.002]
    )
    run_until_stopped(config(*recipe, run_dir=tmp_path / "run"), monkeypatch, step=4)
    again = config(f"resume={tmp_path / 'run'}", run_dir=tmp_path / "run")
    run_until_stopped(again, monkeypatch, step=5)  # the ninth of all
    run_until_stopped(again, monkeypatch, step=8)  # the seventeenth
    run(again)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("phase", ["validation", "test"])
def test_stopped_in_evaluation(phase, uninterrupted, tmp_path, monkeypatch):
    run_until_stopped(config(*RUN, run_dir=tmp_path / "run"), monkeypatch, 2, phase=phase)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_moved_run_resumes_in_its_new_place(uninterrupted, tmp_path, monkeypatch):
    run_until_stopped(config(*RUN, run_dir=tmp_path / "run"), monkeypatch, 17)
    (tmp_path / "run").rename(tmp_path / "moved")
    run(config("resume=here", run_dir=tmp_path / "moved"))
    assert_same_run(tmp_path / "moved", uninterrupted)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
)
def test_exit_status_tells_the_signal(number, code, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    run_until_stopped(config(*RUN, run_dir=tmp_path / "run"), monkeypatch, 3, code, number=number)
    assert caplog.records[-1].getMessage() == f"To resume: alexnet train resume={tmp_path / 'run'}"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # given back


def test_a_run_stopped_before_its_first_batch_can_be_resumed(uninterrupted, tmp_path, monkeypatch):
    """The signal arrives while data is loaded: nothing is saved yet, and the directory is free or resumable."""
    with monkeypatch.context() as patch:
        patch.setattr(DigitsDataModule, "load", lambda self: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            run(config(*RUN, run_dir=tmp_path / "run"))
    run(config(*RUN, run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_checkpoint_is_written_inside_an_epoch_every_few_minutes(uninterrupted, tmp_path, monkeypatch):
    """An interval of 0 saves after every batch and does not change the run."""
    saved = []
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda obj, file: saved.append(obj.get("position")) or real(obj, file))
    run(config(*RUN, "callbacks.resume.interval_minutes=0", run_dir=tmp_path / "run"))
    inside = [position["step"] for position in saved if position and position["batch"]]
    assert inside == [step for step in range(1, 30) if step % 10]
    assert_same_run(tmp_path / "run", uninterrupted)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["SHA256SUMS", "best.ckpt", "latest.ckpt", "previous.ckpt"]


# --- what resume refuses --------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(uninterrupted, caplog):
    caplog.set_level("INFO")
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert run(config("resume=here", run_dir=uninterrupted)) == finished_result(uninterrupted)["val/acc"]
    assert "has finished" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_changes_are_found_where_they_are_named(uninterrupted):
    saved = OmegaConf.load(uninterrupted / "config.yaml")
    assert diff_configs(saved, config(), []) == {}
    assert diff_configs(saved, config(*RUN), ["model", "data", "trainer.max_epochs", "augment"]) == {}
    now = config(*RUN, "optimizer.lr=0.5", "seed=9", "model/norm=lrn")
    expected = {"optimizer.lr": (0.001, 0.5), "seed": (1, 9), "data.seed": (1, 9)}
    assert diff_configs(saved, now, ["optimizer.lr", "seed"]) == expected
    assert set(diff_configs(saved, now, ["model/norm"])) >= {"model.norm._target_"}
    assert "trainer.max_epochs" in diff_configs(saved, config("experiment=tutorial"), ["experiment"])


@pytest.mark.parametrize(
    ("before", "now", "named", "expected"),
    [
        ((), ("seed=9",), ["seed"], {"seed": 9, "data.seed": 9}),
        (("data_dir=elsewhere", "init_from=torchvision"), ("model=lenet5",), ["experiment"], {}),
        ((), ("seed=9", "data.seed=4"), ["seed", "data.seed"], {"seed": 9, "data.seed": 4}),
        (("data.seed=7",), ("seed=9",), ["seed"], {"seed": 9}),
        ((), ("split_seed=5",), ["split_seed"], {"split_seed": 5, "data.split_seed": 5}),
        (("scheduler=one_cycle", "optimizer=sgd"), ("optimizer.lr=0.5",), ["optimizer.lr"],
         {"optimizer.lr": 0.5, "scheduler.max_lr": 0.5}),
        (("optimizer=sgd",), ("scheduler=one_cycle",), ["scheduler"], {"scheduler.max_lr": 0.01}),
        (("augment=cutout",), ("data.mean=[0.1,0.2,0.3]",), ["data.mean"],
         {key: [0.1, 0.2, 0.3] for key in ("data.mean", "augment.cutout.fill", "data.augment.cutout.fill")}),
        (("augment=crop_flip",), ("data=digits",), ["data"], {}),
        (("augment=none",), ("model=alexnet_bn",), ["model"], {"model.image_size": 50, "data.image_size": 50}),
        (("augment=crop_flip",), ("augment=crop_flip", "augment.crop.padding=1"), ["augment.crop.padding"],
         {"augment.crop.padding": 1, "data.augment.crop.padding": 1}),
        ((), ("data.image_size=40",), ["data.image_size"], {"data.image_size": 40, "model.image_size": 40}),
    ],
)  # fmt: skip
def test_a_change_reaches_the_keys_that_follow_it(before, now, named, expected):
    """Issue: config.yaml holds plain values, so the data module, for one, kept the old augmentation."""
    saved = config("model=lenet5", *before)
    resolve_auto(saved)
    saved = OmegaConf.create(OmegaConf.to_container(saved, resolve=True))
    current = config(*now)
    resolve_auto(current)
    changed = {key: new for key, (_, new) in diff_configs(saved, current, named).items()}
    if named[0] in ("scheduler", "model"):  # another class, with other keys
        changed = {key: new for key, new in changed.items() if key in expected}
    assert changed == expected


def test_the_keys_that_follow_others_are_known():
    """A new interpolation in conf/ fails here, unless a resumed run takes its value from somewhere else."""
    found = set()
    for path in sorted((REPOSITORY / "conf").rglob("*.yaml")):
        relative = path.relative_to(REPOSITORY / "conf")
        if relative.parts[0] in ("augment", "data", "loss", "optimizer", "scheduler"):
            for key, source in re.findall(r"^ *(\w+): \$\{([\w.]+)\}", path.read_text(encoding="utf-8"), re.M):
                name = f"augment.step.{key}" if relative.parts[0] == "augment" else f"{relative.parts[0]}.{key}"
                found.add((name, source))
    assert len(found) > 6
    for key, source in found - {("data.root", "data_dir")}:  # resume=RUN ++data.root=DIR
        assert any(fnmatchcase(key, pattern) and source == origin for pattern, origin in COPIES), (key, source)


@pytest.mark.parametrize("setting", ["scale=lab", "model.norm._target_=x", "scale.convolutions=0.25"])
def test_a_change_of_the_network_is_refused(setting, uninterrupted):
    saved = OmegaConf.load(uninterrupted / "config.yaml")
    changed = diff_configs(saved, config("model=lenet5", f"++{setting}" if "." in setting else setting),
                           [setting.split("=")[0]])  # fmt: skip
    with pytest.raises(ConfigError, match="resume cannot change the network: "):
        apply_changes(saved, changed, allowed=True)


def test_another_image_size_is_refused_by_a_network_that_depends_on_it(stopped, monkeypatch):
    before = (stopped / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"latest.ckpt is of another network: mis-shaped: .*weight"):
        resume_with(monkeypatch, stopped, "data.image_size=80", "allow_changes=true")
    assert (stopped / "config.yaml").read_bytes() == before


def test_a_resumed_run_keeps_its_threads(uninterrupted):
    saved = OmegaConf.load(uninterrupted / "config.yaml")
    assert saved.threads == finished_result(uninterrupted)["threads"]
    saved.threads = 3
    assert "threads" not in diff_configs(saved, config("experiment=tutorial"), ["experiment"])
    assert diff_configs(saved, config("threads=2"), ["threads"]) == {"threads": (3, 2)}


@pytest.fixture
def stopped(tmp_path, monkeypatch) -> Path:
    run_until_stopped(config(*RUN, run_dir=tmp_path / "run"), monkeypatch, 15)
    return tmp_path / "run"


def resume_with(monkeypatch, run_dir: Path, *overrides: str) -> None:
    """Resume with settings beside it, as the command line would hand them over."""
    monkeypatch.setattr(
        "alexnet_pl.training.run.named_on_the_command_line", lambda: [o.split("=")[0] for o in overrides]
    )
    run(config("resume=here", *overrides, run_dir=run_dir))


def test_changed_settings_are_refused_with_their_names(stopped, monkeypatch):
    with pytest.raises(ConfigError, match=r"optimizer.lr \(0.001 → 0.5\), trainer.max_epochs \(3 → 9\)"):
        resume_with(monkeypatch, stopped, "optimizer.lr=0.5", "trainer.max_epochs=9")
    with pytest.raises(ConfigError, match=r"seed \(1 → 3\)"):
        resume_with(monkeypatch, stopped, "seed=3")
    monkeypatch.setattr("alexnet_pl.training.run.named_on_the_command_line", lambda: ["model.fc_width"])
    with pytest.raises(ConfigError, match="cannot change the network: model.fc_width"):
        run(config("model.fc_width=64", "resume=here", "allow_changes=true", run_dir=stopped))


def test_changes_that_are_allowed_take_effect(stopped, monkeypatch):
    monkeypatch.setattr(
        "alexnet_pl.training.run.named_on_the_command_line", lambda: ["optimizer.lr", "trainer.max_epochs"]
    )
    run(config("resume=here", "allow_changes=true", "optimizer.lr=0.0005", "trainer.max_epochs=4",
               run_dir=stopped))  # fmt: skip
    rows = metric_rows(stopped)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[1]["lr"]) == pytest.approx(0.0005)
    assert OmegaConf.load(stopped / "config.yaml").trainer.max_epochs == 4


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory"):
        run(config("resume=here", run_dir=tmp_path))
    (tmp_path / "config.yaml").write_text("{ this is: not")
    with pytest.raises(ConfigError, match="config.yaml is corrupt"):
        run(config("resume=here", run_dir=tmp_path))


# --- starting from another run's weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "checkpoints/best.ckpt"])
def test_a_warm_start_begins_with_the_other_runs_weights(source, uninterrupted, tmp_path, caplog):
    caplog.set_level("INFO")
    still = ("trainer.max_epochs=1", "optimizer.lr=1e-12", "model.dropout=0", f"init_from={uninterrupted / source}")
    run(config(*RUN, *still, run_dir=tmp_path / "run"))
    best = read_checkpoint(uninterrupted / "checkpoints" / "best.ckpt")["state_dict"]
    for name, value in weights(tmp_path / "run").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, best[name])
    assert "weights from" in caplog.text


def test_a_warm_start_names_what_does_not_fit(uninterrupted, tmp_path, caplog):
    caplog.set_level("INFO")
    run(config(*RUN, "trainer=smoke", "model.fc_width=48", "model/norm=lrn", "model.bias_before_norm=true",
               f"init_from={uninterrupted}", run_dir=tmp_path / "run"))  # fmt: skip
    (line,) = [record.getMessage() for record in caplog.records if "weights from" in record.getMessage()]
    assert "missing: features.conv1.bias, features.conv2.bias" in line
    assert "unexpected: features.norm1.weight" in line
    assert "mis-shaped: classifier.fc6.weight (16, 6) instead of (48, 6)" in line
    with pytest.raises(CheckpointError, match="has no weights for this network"):
        run(config("model=lenet5", "model.channels=[5,7]", "model.fc_widths=[3,4]", "trainer=smoke",
                   f"init_from={uninterrupted}", run_dir=tmp_path / "other"))  # fmt: skip


# --- torchvision's weights ------------------------------------------------------------------------------------------


NARROW = ("model=alexnet_torchvision", "model.channels=[4,6,8,8,6]", "model.fc_width=16", "model.image_size=70")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server with a narrow network's weights, under torchvision's names and named by their hash; a cache of its own.

    That the names are torchvision's and the logits equal at full size: tests/test_networks.py.
    """
    torch.manual_seed(0)
    theirs = instantiate(config(*NARROW).model).eval()
    names = {ours: theirs for theirs, ours in TORCHVISION_LAYERS.items()}
    renamed = {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value
               for name, value in theirs.state_dict().items()}  # fmt: skip
    draft = tmp_path / "draft.pth"
    torch.save(renamed, draft)
    folder = tmp_path / "served"
    folder.mkdir()
    name = f"alexnet-{hashlib.sha256(draft.read_bytes()).hexdigest()[:8]}.pth"
    draft.rename(folder / name)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/{name}"))
    monkeypatch.setattr("alexnet_pl.training.weights.AlexNet_Weights", weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield theirs, folder / name
    server.shutdown()
    server.server_close()


def test_torchvisions_weights_are_downloaded_verified_and_give_its_logits(served, tmp_path):
    theirs, file = served
    images = torch.randn(1, 3, 70, 70)
    net = instantiate(config(*NARROW).model).eval()
    for source in ("torchvision", str(file), "torchvision"):  # the third finds it in the cache
        assert warm_start(net, source).startswith("16 of 16 weights from ")
        with torch.no_grad():
            torch.testing.assert_close(net(images), theirs(images), atol=1e-5, rtol=0)
            for parameter in net.parameters():
                parameter.zero_()
        if source != "torchvision":
            file.unlink()  # from here on there is nothing to download

    cached = tmp_path / "torch" / "hub" / "checkpoints" / file.name
    cached.write_bytes(cached.read_bytes()[:1000])
    for damage in ("corrupt", "missing"):
        with pytest.raises(CheckpointError, match="(?s)init_from=torchvision: http.*init_from=FILE") as refusal:
            warm_start(net, "torchvision")
        assert str(refusal.value).count("\n") == 1, damage
        cached.unlink(missing_ok=True)


def test_a_download_with_the_wrong_hash_is_not_kept(served, tmp_path):
    _, file = served
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    net = instantiate(config(*NARROW).model)
    with pytest.raises(CheckpointError, match="invalid hash value"):
        warm_start(net, "torchvision")
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]


def test_other_numbers_of_classes_keep_their_last_layer(served):
    theirs, file = served
    net = instantiate(config(*NARROW, "model.num_classes=10").model)
    own = net.classifier.fc8.weight.clone()
    line = warm_start(net, str(file))
    assert line.startswith("14 of 16 weights from ")
    assert "mis-shaped: classifier.fc8.weight (1000, 16) instead of (10, 16)" in line
    assert torch.equal(net.features.conv3.weight, theirs.features.conv3.weight)
    assert torch.equal(net.classifier.fc8.weight, own)
