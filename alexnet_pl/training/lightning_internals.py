"""Private attributes of Lightning, torch and torchmetrics: every use in this package, with a test for each."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, WeightAveraging
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from alexnet_pl.training.checkpoint_io import refuse_misfits

if TYPE_CHECKING:  # a run without TensorBoard does not load it
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter


def set_position(trainer: Trainer, epoch: int, batch: int, step: int) -> None:
    """Make the next ``trainer.fit`` start at a position.

    At batch 0 the loops start the epoch as they start any other. Inside an epoch they count ``batch`` batches as done,
    which the loader has to skip.

    Args:
        epoch: finished epochs.
        batch: finished batches of the current epoch.
        step: optimizer steps taken so far.
    """
    fit, epochs = trainer.fit_loop, trainer.fit_loop.epoch_loop
    progress: Any  # the trackers share no type that has all four counters
    for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
        progress.processed = progress.completed = epoch
        progress.ready = progress.started = epoch + (batch > 0)
    optimizer = epochs.automatic_optimization.optim_progress.optimizer
    optimizer.step.total.ready = optimizer.step.total.completed = step
    epochs._batches_that_stepped = step
    for progress, done in ((epochs.batch_progress.total, step), (epochs.batch_progress.current, batch)):
        progress.ready = progress.started = progress.processed = progress.completed = done
    if batch > 0:  # with max_steps, setting it to False means True to the fit loop
        fit.restarting = True


def end_restart(trainer: Trainer) -> None:
    """Tell the fit loop that it has resumed. Otherwise it would skip the plateau schedule at the end of the epoch."""
    trainer.fit_loop._restarting = False


def guard_restoring(trainer: Trainer, check: Callable[[dict[str, Any], bool], None]) -> None:
    """Make ``trainer.fit`` and ``trainer.test`` raise ConfigError for a checkpoint whose parts do not fit.

    Args:
        check: called with the checkpoint and False before the state of optimizers and schedules is restored, and with
            True after it.
    """
    connector: Any = trainer._checkpoint_connector
    restore_modules, restore_state = connector._restore_modules_and_callbacks, connector.restore_training_state
    path: Any = None

    def modules(checkpoint_path: Any = None, *arguments: Any) -> None:
        nonlocal path
        path = checkpoint_path
        with refuse_misfits(path):
            restore_modules(checkpoint_path, *arguments)

    def state() -> None:
        checkpoint = connector._loaded_checkpoint if trainer.state.fn == "fit" else None
        with refuse_misfits(path):
            if checkpoint:
                check(checkpoint, False)
            restore_state()
            if checkpoint:
                check(checkpoint, True)

    connector._restore_modules_and_callbacks = modules
    connector.restore_training_state = state


def disable_sigterm_broadcast(trainer: Trainer) -> None:
    """Stop Lightning from asking rank 0 in every step if it received SIGTERM, which makes the CPU wait for the GPU."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def dump_weights(trainer: Trainer) -> dict[str, Any]:
    """Return a checkpoint without optimizer and callback states; its weights share the memory of the network."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=True)


def use_average(trainer: Trainer, model: LightningModule) -> None:
    """Give the network the averaged weights, if there are any, as Lightning does when training ends.

    A run that was stopped after that is resumed with the raw ones, and the hook at the end of training does not run.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's own name
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            callback._copy_average_to_current(model)


def move_average(callback: WeightAveraging, device: torch.device) -> None:
    """Move the averaged weights to the device that trains, without their counter, which the CPU reads in every step."""
    if callback._average_model is not None:
        counter = callback._average_model.n_averaged
        callback._average_model = callback._average_model.to(device)
        callback._average_model.n_averaged = counter


def mark_updated(metric: Metric) -> None:
    """Mark a metric whose states were restored as updated, which silences the warning of ``compute``."""
    metric._update_count = 1


def inductor_options(mode: str) -> dict[str, Any]:
    """Return the inductor options that a ``torch.compile`` mode stands for."""
    return dict(torch._inductor.list_mode_options(mode))


def loss_scale(trainer: Trainer) -> Tensor | None:
    """Return a copy of the float16 loss scale on its device, None without a scaler. ``get_scale`` would synchronize."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler._scale.clone()


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Return True if the optimizer unscales gradients in its own step, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def add_summary(writer: SummaryWriter, summary: Summary, step: int | None = None) -> None:
    """Write a summary that TensorBoard's public methods cannot express."""
    writer._get_file_writer().add_summary(summary, step)


def uncompiled(net: torch.nn.Module) -> torch.nn.Module:
    """Return the network inside a ``torch.compile`` wrapper, or the network itself."""
    return getattr(net, "_orig_mod", net)


_is_heap_frozen = False  # gc.get_freeze_count takes 0.05 s


def free_traced_types(freeze: bool = False) -> None:
    """Free the class types that torch keeps of every network it has traced (1.5 MB per LeNet-5).

    They share a registry with the types of scripted modules and classes. As long as one of those is alive, nothing is
    freed, because it would lose its methods, and using it would crash the process.

    Args:
        freeze: exempt all objects that are alive from garbage collection, once per process. A process that trains many
            networks has 700,000 objects of imported modules, and walking through them takes 0.2 s. Nothing is frozen
            while a scripted module is alive, so the search for one never misses any.
    """
    global _is_heap_frozen
    gc.collect()
    is_in_use = any(issubclass(type(thing), torch.jit.ScriptModule) for thing in gc.get_objects())
    if not is_in_use and not torch.jit._state._script_classes:
        torch._C._jit_clear_class_registry()
        torch.jit._state._clear_class_state()
        torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
        if freeze and not _is_heap_frozen:
            gc.collect()
            gc.freeze()
            atexit.register(gc.unfreeze)  # otherwise triton's bindings print all of theirs as leaks
            _is_heap_frozen = True


class EpochProgressBar(RichProgressBar):
    """Progress bar on a terminal that counts epochs from 1, as the log does."""

    def __init__(self) -> None:
        super().__init__(leave=False)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}".ljust(len(self.validation_description))
