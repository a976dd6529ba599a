"""Private attributes that this project uses: each test fails by name when an upgrade removes one."""

import io

import pytest
import torch
from lightning import Trainer
from torch.amp import GradScaler
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import scalar

from alexnet_pl.training import lightning_internals as internals
from alexnet_pl.training.callbacks.averaging import EMA
from alexnet_pl.training.classifier import ClassificationMetrics, ImageClassifier


@pytest.fixture
def trainer(tmp_path) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", max_epochs=3, default_root_dir=tmp_path, **quiet)


def test_set_position(trainer):
    internals.set_position(trainer, epoch=2, batch=5, step=45)
    assert (trainer.current_epoch, trainer.global_step) == (2, 45)
    loop = trainer.fit_loop
    assert loop.epoch_loop._batches_that_stepped == 45
    assert loop.epoch_loop.batch_progress.current.completed == 5
    assert loop.restarting


def test_a_position_at_the_start_of_an_epoch_is_no_restart(trainer):
    trainer.fit_loop.epoch_loop.max_steps = 50
    internals.set_position(trainer, epoch=2, batch=0, step=40)
    assert not trainer.fit_loop.restarting


def test_end_restart(trainer):
    internals.set_position(trainer, epoch=0, batch=1, step=1)
    internals.end_restart(trainer)
    assert trainer.fit_loop._restarting is False


def test_disable_sigterm_broadcast(trainer):
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    internals.disable_sigterm_broadcast(trainer)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_dump_weights(trainer):
    model = ImageClassifier(torch.nn.Linear(2, 2), 2, torch.optim.SGD)
    trainer.strategy.connect(model)
    assert set(internals.dump_weights(trainer)["state_dict"]) == {"net.weight", "net.bias"}


def test_move_average(trainer):
    model = ImageClassifier(torch.nn.Linear(2, 2), 2, torch.optim.SGD)
    average = EMA()
    average.setup(trainer, model, "fit")
    internals.move_average(average, torch.device("meta"))
    assert next(average._average_model.parameters()).device.type == "meta"


def test_mark_updated():
    metric = ClassificationMetrics(top_k=1)
    assert not metric.update_called
    internals.mark_updated(metric)
    assert metric.update_called


def test_inductor_options():
    assert internals.inductor_options("max-autotune")["max_autotune"] is True
    assert internals.inductor_options("default") == {}


def test_loss_scale(trainer):
    assert internals.loss_scale(trainer) is None
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))  # creates the tensor
    trainer.strategy._precision_plugin = trainer.precision_plugin
    trainer.precision_plugin.scaler = scaler
    assert float(internals.loss_scale(trainer)) == 8.0


def test_unscales_in_step():
    weight = torch.nn.Parameter(torch.zeros(1))
    assert internals.unscales_in_step(torch.optim.SGD([weight], fused=True))
    assert not internals.unscales_in_step(torch.optim.SGD([weight]))


def test_add_summary(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        internals.add_summary(writer, scalar("tag", 1.0), 3)
    (path,) = tmp_path.iterdir()
    assert b"tag" in io.BytesIO(path.read_bytes()).read()


def test_uncompiled():
    net = torch.nn.Linear(1, 1)
    assert internals.uncompiled(torch.compile(net)) is net
    assert internals.uncompiled(net) is net


def test_progress_bar_counts_epochs_from_one(trainer):
    bar = internals.EpochProgressBar()
    bar._trainer = trainer
    assert bar._get_train_description(0).startswith("epoch 1/3")
