"""Optimizations leave the loss curve unchanged and fall back to the plain path if they fail."""

import csv
from pathlib import Path

import pytest
import torch
from helpers import config, train
from lightning import Trainer
from torch import nn

from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.build import compile_network
from alexnet_pl.training.run import run

SMALL = (
    *("model=alexnet_lrn", "model.channels=[4,6,8,8,6]", "model.fc_width=16", "data=digits"),
    *("trainer=smoke", "trainer.fast_dev_run=6", "trainer.accelerator=cpu", "trainer.precision=32-true"),
)


def curve(run_dir: Path) -> list[tuple[float, float]]:
    with (run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [(float(row["train/loss"]), float(row["val/loss"])) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    run(config(*SMALL, "channels_last=false", "optimizer.fused=false", run_dir=run_dir))
    return curve(run_dir)


@pytest.mark.parametrize("fast", ["optimizer.fused=true", "channels_last=true"])
def test_fused_optimizer_and_channels_last_keep_the_loss_curve(fast, plain, tmp_path):
    run(config(*SMALL, fast, run_dir=tmp_path / "run"))
    assert curve(tmp_path / "run") == [pytest.approx(losses, rel=1e-4) for losses in plain]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["", "no-such-compiler"])
def test_compilation_keeps_the_loss_curve_even_if_the_compiler_fails(compiler, plain, tmp_path):
    environment = {"CXX": compiler, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"} if compiler else {}
    done = train(*SMALL, "compile=default", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    warning = "warning: compile=default failed, falling back to eager mode"
    assert (done.stdout + done.stderr).count(warning) == (1 if compiler else 0)
    assert curve(tmp_path / "run") == [pytest.approx(losses, rel=1e-4) for losses in plain]
    keys = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert "net.features.conv1.weight" in keys  # not net._orig_mod.…


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compile=fast", "compile=fast is invalid: expected null or one of: default, reduce-overhead, max-autotune"),
        ("channels_last=maybe", "channels_last=maybe is invalid: expected true, false or auto"),
        (
            "callbacks.nan_monitor.check_every_n_steps=0",
            "callbacks.nan_monitor.check_every_n_steps=0 is invalid: expected a positive integer",
        ),
        (
            "callbacks.resume.min_interval_seconds=-1",
            "callbacks.resume.min_interval_seconds=-1 is invalid: expected 0 or more",
        ),
    ],
)
def test_invalid_speed_options_are_refused(override, message, tmp_path):
    with pytest.raises(Exception, match=message) as found:
        run(config(*SMALL, override, run_dir=tmp_path / "run"))
    assert isinstance(found.value if isinstance(found.value, ConfigError) else found.value.__cause__, ConfigError)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_masks_differ_between_replays_of_a_cuda_graph():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).cuda()
    images = torch.ones(8, 3, 16, 16)
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, enable_checkpointing=False)
    compile_network(net, "reduce-overhead", images, trainer)
    masks = [net(images.cuda().requires_grad_()).detach().clone() for _ in range(4)]
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])
