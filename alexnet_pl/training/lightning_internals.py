"""training.lightning_internals."""

from lightning import Trainer


def set_position(trainer: Trainer, position: dict[str, int]) -> None:
    """Let the next ``trainer.fit`` start at ``position``.

    ``position`` holds ``epoch`` and ``batch``, both counted from 0, and ``step``, the optimiser steps done.
    At batch 0 the loops start the epoch as any other. Inside an epoch they are told that ``batch`` batches are done;
    the loader has to leave those out.
    """
    fit, epochs = trainer.fit_loop, trainer.fit_loop.epoch_loop
    for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
        progress.processed = progress.completed = position["epoch"]
        progress.ready = progress.started = position["epoch"] + (position["batch"] > 0)
    optimizer = epochs.automatic_optimization.optim_progress.optimizer
    optimizer.step.total.ready = optimizer.step.total.completed = position["step"]
    epochs._batches_that_stepped = position["step"]
    for progress, done in ((epochs.batch_progress.total, "step"), (epochs.batch_progress.current, "batch")):
        progress.ready = progress.started = progress.processed = progress.completed = position[done]
    fit.restarting = position["batch"] > 0
