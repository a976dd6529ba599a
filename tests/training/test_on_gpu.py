"""Networks, optimizers and runs on a CUDA GPU, in the 16-bit precision that they have there by default."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import REPOSITORY, config, run_until_stopped
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from alexnet_pl.runtime.run_folder import finished_result, read_metrics
from alexnet_pl.training.optimizers import Muon, orthogonalize
from alexnet_pl.training.run import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MODELS = sorted(path.stem for path in (REPOSITORY / "conf" / "model").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Compute float32 products with all bits, as on a CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def small(model: str) -> tuple[nn.Module, Tensor]:
    """Return a network without dropout, and 16 images whose scale is that of its recipe."""
    names = ["model.fc_width=64"] if "fc_width" in config(f"model={model}").model else []
    cfg = config(f"model={model}", *names)
    torch.manual_seed(0)
    net = instantiate(cfg.model)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    side = cfg.model.image_size
    return net, F.interpolate(torch.randn(16, 3, side // 4 + 1, side // 4 + 1), size=(side, side), mode="bicubic")


def loss_and_gradients(net: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    labels = torch.arange(len(images), device=images.device) % 10
    logits = net(images)
    loss = F.cross_entropy(logits.to(images.dtype), labels)
    return logits.detach().double().cpu(), [
        gradient.double().cpu() for gradient in torch.autograd.grad(1024 * loss, list(net.parameters()))
    ]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("model", MODELS)
def test_logits_and_gradients_agree_with_float64(model):
    """Channels last, in 32 and in 16 bits; batch statistics of 16 images make the gradients the less accurate ones."""
    net, images = small(model)
    expected, slopes = loss_and_gradients(net.double(), images.double())
    net = net.float().cuda().to(memory_format=torch.channels_last)
    images = images.cuda()
    logits, gradients = loss_and_gradients(net, images)
    assert distance(logits, expected) < 1e-4
    together = distance(torch.cat([g.flatten() for g in gradients]), torch.cat([s.flatten() for s in slopes]))
    assert together < 5e-3
    with torch.autocast("cuda", torch.float16):
        logits, gradients = loss_and_gradients(net, images)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert distance(logits, expected) < 0.02
    assert distance(torch.cat([g.flatten() for g in gradients]), torch.cat([s.flatten() for s in slopes])) < 0.1


def test_muon_orthogonalizes_as_on_the_cpu():
    torch.manual_seed(0)
    matrix = torch.randn(256, 2304, dtype=torch.float64)
    expected = orthogonalize(matrix)
    assert distance(orthogonalize(matrix.float().cuda()).double().cpu(), expected) < 1e-4
    assert distance(orthogonalize(matrix.bfloat16().cuda()).double().cpu(), expected) < 0.05
    weights = [nn.Parameter(matrix.float().to(device)) for device in ("cpu", "cuda")]
    for weight in weights:
        weight.grad = weight.detach().clone()
        Muon([weight], lr=0.1, weight_decay=0.01, bfloat16=False).step()
    assert distance(weights[1].detach().double().cpu(), weights[0].detach().double()) < 1e-6


@pytest.mark.parametrize("overrides", [
    ("model=alexnet_lrn", "optimizer=adam", "final_evaluation=true"),
    ("model=alexnet_modern", "optimizer=muon", "callbacks=ema", "augment=[crop,alternating_flip,cutout]",
     "data.test_crops=6", "scheduler=one_cycle"),
])  # fmt: skip
def test_a_stopped_run_resumes_on_a_gpu(overrides, tmp_path: Path, monkeypatch):
    """It learns what an uninterrupted run learns, up to the digits in which sums in another order differ."""
    recipe = ("model.fc_width=64", "data=digits", "trainer.max_epochs=6", "callbacks.resume.min_interval_seconds=0")
    run(config(*overrides, *recipe, run_dir=tmp_path / "whole"))
    result, rows = finished_result(tmp_path / "whole"), read_metrics(tmp_path / "whole")
    assert (result["precision"], result["device"][:6]) == ("16-mixed", "cuda (")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    if "final_evaluation=true" in overrides:
        assert result["val/loss_final"] == pytest.approx(rows[-1]["val/loss"], rel=1e-2)
    run_until_stopped(config(*overrides, *recipe, run_dir=tmp_path / "cut"), monkeypatch, 15)
    run(config("resume=here", run_dir=tmp_path / "cut"))
    again = read_metrics(tmp_path / "cut")
    assert [row["lr"] for row in again] == [row["lr"] for row in rows]
    assert [row["train/loss"] for row in again] == pytest.approx([row["train/loss"] for row in rows], rel=0.15)


EXPERIMENTS = sorted({
    OmegaConf.load(path).study.experiment for path in (REPOSITORY / "conf" / "claims").glob("*.yaml")
} | {"record"})  # fmt: skip


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_studies_run_on_a_gpu_to_their_last_step(experiment, class_folders, tmp_path: Path):
    """Training, validation, the test with its views, and the final evaluation where a study has it."""
    sizes = [f"trainer.limit_{split}_batches=2" for split in ("train", "val", "test")]
    names = [f"experiment={experiment}", f"data.root={class_folders(20, 10)}", "data.batch_size=32", *sizes]
    cfg = config(*names, "trainer.max_epochs=1", "trainer.accelerator=gpu", run_dir=tmp_path / "run")
    run(cfg)
    result = finished_result(tmp_path / "run")
    assert result["status"] == "finished"
    assert ("test/loss_final" in result) == bool(cfg.final_evaluation)


def test_a_run_is_evaluated_on_a_gpu_as_it_was_tested(tmp_path: Path):
    run(config("model=lenet5", "data=digits", "trainer.max_epochs=2", run_dir=tmp_path / "run"))
    command = [sys.executable, "-m", "alexnet_pl", "evaluate", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, result = json.loads(done.stdout), finished_result(tmp_path / "run")
    assert found["test/acc"] == pytest.approx(result["test/acc"], abs=0.005)
