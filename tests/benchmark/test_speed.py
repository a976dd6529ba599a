"""What is done for speed changes no figure, and gives way where it cannot be had. How fast it is: alexnet benchmark."""

import csv
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import config, train
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor, nn

import alexnet_pl.benchmark.loops
import alexnet_pl.cli.benchmark
import alexnet_pl.models.layers
from alexnet_pl.data.loaders import IGNORE_INDEX
from alexnet_pl.models.layers import local_response_norm
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.system import raise_malloc_thresholds
from alexnet_pl.training.build import compile_network
from alexnet_pl.training.callbacks.nan_monitor import NaNMonitor, NonFiniteError
from alexnet_pl.training.classifier import ClassificationMetrics
from alexnet_pl.training.run import run

SMALL = (
    *("model=alexnet_lrn", "model.channels=[4,6,8,8,6]", "model.fc_width=16", "data=digits"),
    *("trainer=smoke", "trainer.limit_train_batches=6", "trainer.accelerator=cpu", "trainer.precision=32-true"),
)


def curve(run_dir: Path) -> list[tuple[float, float]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [(float(row["train/loss"]), float(row["val/loss"])) for row in csv.DictReader(file)]


# --- the fast path is the plain one ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(config(*SMALL, "channels_last=false", "optimizer.fused=false", run_dir=folder))
    return curve(folder)


@pytest.mark.parametrize("fast", ["optimizer.fused=true", "channels_last=true"])
def test_the_fast_path_has_the_plain_ones_loss_curve(fast, plain, tmp_path):
    run(config(*SMALL, fast, run_dir=tmp_path / "run"))
    assert curve(tmp_path / "run") == [pytest.approx(losses, rel=1e-4) for losses in plain]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["", "no-such-compiler"])
def test_a_compiled_network_is_the_plain_one_also_where_the_compiler_fails(compiler, plain, tmp_path):
    environment = {"CXX": compiler, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"} if compiler else {}
    done = train(*SMALL, "compile=default", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    warning = "warning: compile=default failed, the run goes on without it"
    assert (done.stdout + done.stderr).count(warning) == (1 if compiler else 0)
    assert curve(tmp_path / "run") == [pytest.approx(losses, rel=1e-4) for losses in plain]
    keys = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert "net.features.conv1.weight" in keys  # not net._orig_mod.…


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compile=fast", "compile=fast is not possible: it is null or one of default, reduce-overhead, max-autotune"),
        ("channels_last=maybe", "channels_last=maybe is not possible: it is true, false or auto"),
        ("callbacks.nan_monitor.check_every_n_steps=0", "callbacks.nan_monitor.check_every_n_steps=0 is not possible"),
        ("callbacks.resume.min_interval_seconds=-1", "callbacks.resume.min_interval_seconds=-1 is not possible"),
    ],
)
def test_settings_for_speed_are_checked(override, message, tmp_path):
    with pytest.raises(Exception, match=message) as found:
        run(config(*SMALL, override, run_dir=tmp_path / "run"))
    assert isinstance(found.value if isinstance(found.value, ConfigError) else found.value.__cause__, ConfigError)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_differs_between_replays_of_a_recorded_graph():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).cuda()
    images = torch.ones(8, 3, 16, 16)
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, enable_checkpointing=False)
    compile_network(net, "reduce-overhead", images, trainer)
    masks = [net(images.cuda().requires_grad_()).detach().clone() for _ in range(4)]
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])


# --- local response normalisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1, 200, 2**18])
@pytest.mark.parametrize(("size", "beta"), [(1, 0.75), (4, 0.75), (5, 0.75), (5, 0.6)])
def test_lrn_and_its_gradient_are_torchs(size, beta, part, monkeypatch):
    monkeypatch.setattr(alexnet_pl.models.layers, "PART", part)
    generator = torch.Generator().manual_seed(size)
    x, gradient = (torch.randn(5, 9, 4, 3, dtype=torch.float64, generator=generator) * 20 for _ in range(2))

    def results(norm) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(gradient)
        return y.detach(), leaf.grad

    ours = results(lambda x: local_response_norm(x, size, alpha=0.1, beta=beta, k=2.0))
    expected = results(lambda x: F.local_response_norm(x, size, alpha=0.1, beta=beta, k=2.0))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_lrn_of_no_images():
    assert local_response_norm(torch.zeros(0, 4, 2, 2), 5, 1e-4, 0.75, 2.0).shape == (0, 4, 2, 2)


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 10])
def test_metrics_are_scikit_learns_without_what_fills_batches_up(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(70, classes, generator=generator)
    labels = torch.randint(classes, (70,), generator=generator)
    top_k = min(5, classes)
    metrics = ClassificationMetrics(top_k)
    padding = torch.full((10,), IGNORE_INDEX)
    for batch, targets in zip(logits.split(35), labels.split(35), strict=True):
        batch, targets = torch.cat([batch, batch[:10]]), torch.cat([targets, padding])
        metrics.update(batch, targets, F.cross_entropy(batch, targets, reduction="none"))
    found = {name: float(value) for name, value in metrics.compute().items()}
    probabilities = logits.double().softmax(1)
    acc = accuracy_score(labels, logits.argmax(1))
    top5 = top_k_accuracy_score(labels, probabilities, k=top_k, labels=range(classes)) if top_k < classes else 1.0
    expected = {"loss": log_loss(labels, probabilities, labels=range(classes)), "acc": acc, "acc_top5": top5}
    assert found == pytest.approx({**expected, "error": 1 - acc, "error_top5": 1 - top5}, rel=1e-5)


# --- looking at a GPU's findings now and then -----------------------------------------------------------------------


class Breaking(LightningModule):
    """Its loss is NaN at one step, or its gradient infinite, and finite again after that."""

    def __init__(self, at: int, what: str):
        super().__init__()
        self.weight, self.at, self.what = nn.Parameter(torch.ones(3)), at, what

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        breaks = self.global_step == self.at
        if breaks and self.what == "gradient":
            self.weight.register_hook(lambda gradient: gradient * float("inf"))
        return self.weight.sum() * (float("nan") if breaks and self.what == "loss" else 1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Batches:
    """Ten batches of four images."""

    def __len__(self) -> int:
        return 10

    def __iter__(self):
        return iter([torch.zeros(4)] * 10)

    def batches(self) -> list[Tensor]:
        return [torch.arange(4) + 4 * batch for batch in range(10)]


class AsOnAGPU(NaNMonitor):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._at_once = False


def trainer_with(callback: NaNMonitor, folder: Path) -> Trainer:
    return Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder, callbacks=[callback],
    )  # fmt: skip


@pytest.mark.parametrize(("every", "seen_at"), [(1, 13), (5, 15), (50, 20)])
def test_a_loss_that_was_not_finite_is_named_however_late_it_is_seen(every, seen_at, tmp_path):
    trainer = trainer_with(AsOnAGPU(check_every_n_steps=every), tmp_path)
    message = r"the loss is nan at step 12 \(epoch 2, batch 2, 4 images: 8, 9, 10, 11;"
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit(Breaking(at=12, what="loss"), Batches(), Batches())
    assert trainer.global_step == seen_at


@pytest.mark.parametrize("at", [12, 19])
def test_a_gradient_that_was_not_finite_is_named_a_step_later_or_before_validation(at, tmp_path):
    trainer = trainer_with(NaNMonitor(), tmp_path)
    with pytest.raises(NonFiniteError, match=rf"the gradient is nan at step {at} \(epoch 2, batch {at - 10}, 4 images"):
        trainer.fit(Breaking(at=at, what="gradient"), Batches(), Batches())
    assert trainer.global_step == at + 1


# --- memory ---------------------------------------------------------------------------------------------------------

FAULTS = """
import ctypes, resource, sys
from alexnet_pl.runtime.system import raise_malloc_thresholds, restore_malloc_thresholds
change = {"keep": raise_malloc_thresholds, "return": restore_malloc_thresholds}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for name in sys.argv[1:]:
    assert change[name]()
for repeat in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**27)  # 128 MB, 32,768 pages
    ctypes.memset(block, 1, 2**27)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not raise_malloc_thresholds(), reason="the C library is not glibc")
def test_freed_memory_is_kept_and_can_be_returned():
    def faults(*changes: str) -> int:
        command = [sys.executable, "-c", FAULTS, *changes]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100
    assert faults("keep", "return") > 1000  # fewer than pages where the system has huge ones


def test_images_too_large_for_the_gpu_stay_in_host_memory(monkeypatch, caplog):
    data = instantiate(config("data=digits", "model=lenet5").data)
    data.setup()
    loader = data.train_dataloader()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * loader.images.nbytes, 10**9))
    caplog.set_level(logging.INFO, "alexnet_pl")
    data.move_to(torch.device("cuda", 0))
    assert "images stay in host memory" in caplog.text
    assert loader.images.device.type == "cpu"
    assert next(iter(loader))[0].device.type == "cpu"


def test_splits_share_their_images_on_the_device():
    data = instantiate(config("data=digits", "model=lenet5").data)
    data.setup()
    data.move_to(torch.device("meta"))  # the one device besides the CPU that every machine has
    train, val = data.train_dataloader(), data.val_dataloader()
    assert train.images.device.type == "meta"
    assert train.images is val.images


# --- the benchmark --------------------------------------------------------------------------------------------------


def test_the_benchmark_refuses_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda is not possible"):
        alexnet_pl.cli.benchmark.main(["--device", "cuda"])


@pytest.mark.slow
def test_the_benchmark_has_the_figures_that_it_promises(monkeypatch):
    monkeypatch.setattr(alexnet_pl.benchmark.loops, "LRN_SHAPES", ((2, 8, 5, 5),))
    monkeypatch.setattr(alexnet_pl.benchmark.loops, "IMAGES", {"cpu": 1280})
    found = alexnet_pl.benchmark.loops.bench("cpu", repeats=1, compile_mode=None)
    assert set(found) >= {"project_vs_tutorial", "project_vs_handwritten", "lrn_vs_torch", "input_images_per_second"}
    rates = found["images_per_second"]
    assert set(rates) == {"tutorial", "handwritten", "project"}
    assert found["project_vs_tutorial"] == pytest.approx(rates["project"] / rates["tutorial"])
    assert found["hardware_floor"]["gflop_an_image"] == pytest.approx(0.39, abs=0.01)
    assert all(f"{rate:,.0f}" in alexnet_pl.cli.benchmark.report(found) for rate in rates.values())
