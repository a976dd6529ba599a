"""Training state from a checkpoint, compared with what this run would have saved, before anything computes with it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from alexnet_pl.runtime.errors import ConfigError

SIDES = (2, 3, 5, 7, 11)
"""Sides of a small stand-in for a parameter, all different, so that a side of its state says which one it follows."""

Factory = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]


def check_saved_state(model: Any, trainer: Trainer, checkpoint: Mapping[str, Any], restored: bool) -> None:
    """Check the state of a checkpoint when Lightning restores it.

    Args:
        model: the :class:`~alexnet_pl.training.classifier.ImageClassifier` that the run trains.
        restored: the optimizer has loaded its state; it has not before.

    Raises:
        ConfigError: a part that does not fit the run.
    """
    if not restored:
        configured = [each.scheduler for each in trainer.lr_scheduler_configs]
        check_schedule(configured[0] if configured else None, checkpoint.get("lr_schedulers"))
        if checkpoint.get("inside") is not None:
            check_inside(checkpoint["inside"], model.running_metrics())
    elif trainer.optimizers:
        check_optimizer(trainer.optimizers[0], model.make_optimizer, model.net.named_parameters())


def check_optimizer(optimizer: Optimizer, make: Factory, named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check the state that an optimizer has just loaded, which is never computed with before.

    Fused optimizers read and write their states through pointers, as many values as the parameter has: a tensor of
    another size would corrupt memory. The names and shapes expected are those after one step of an optimizer of the
    same class, with the loaded hyperparameters, on parameters of a few values each.

    Args:
        optimizer: after ``load_state_dict``.
        make: creates an optimizer of the same class from named parameters.
        named: the network's parameters, as ``make`` got them for ``optimizer``.

    Raises:
        ConfigError: names the state that does not fit.
        Exception: what the optimizer raises for hyperparameters that it does not know.
    """
    small = make([(name, _stand_in(parameter)) for name, parameter in named])
    for group, loaded in zip(small.param_groups, optimizer.param_groups, strict=True):
        if missing := set(group) - set(loaded):
            raise ConfigError(
                f"the state of the optimizer is not that of {type(optimizer).__name__}, which the config names: "
                f"{', '.join(sorted(missing))} not found."
            )
        parameters = group["params"]
        group.clear()
        group.update({**loaded, "params": parameters})
    if isinstance(optimizer, LBFGS):  # its step needs the loss, and its states are lists of flat vectors
        return
    small.step()
    for group, loaded in zip(small.param_groups, optimizer.param_groups, strict=True):
        for stand_in, parameter in zip(group["params"], loaded["params"], strict=True):
            if found := optimizer.state.get(parameter):
                _check_state(found, small.state.get(stand_in, {}), parameter)


def has_same_state(model: Any, saved: Mapping[str, Any]) -> bool:
    """Return True if an optimizer's saved state has the parts that the configured optimizer keeps.

    Groups of other sizes cannot be loaded, and a parameter's state without a part, such as that of ``amsgrad``, ends in
    an error in the first step.

    Args:
        model: the :class:`~alexnet_pl.training.classifier.ImageClassifier` that the run trains.
        saved: ``state_dict`` of an optimizer of the same class.
    """
    small = model.make_optimizer([(name, _stand_in(parameter)) for name, parameter in model.net.named_parameters()])
    own, found = ([len(group["params"]) for group in groups] for groups in (small.param_groups, saved["param_groups"]))
    if own != found:
        return False
    if isinstance(small, LBFGS):
        return True
    small.step()
    expected = {frozenset(state) for state in small.state.values() if state}
    return {frozenset(state) for state in saved["state"].values() if state} <= expected


def check_schedule(scheduler: Any, states: Any) -> None:
    """Check that a scheduler saved the state that it is about to load.

    Args:
        scheduler: as created from the config; None without one.
        states: the checkpoint's ``lr_schedulers``; empty if the schedule starts anew.

    Raises:
        ConfigError: another scheduler saved it.
    """
    known = isinstance(states, list) and all(isinstance(state, dict) for state in states)
    if not known or len(states) > 1:
        raise ConfigError("the state of the scheduler is corrupt.")
    if scheduler is None or not states:
        return
    own = scheduler.state_dict()
    if set(own) != set(states[0]) or any(not _is_alike(states[0][key], value) for key, value in own.items()):
        raise ConfigError(
            f"the state of the scheduler is not that of {type(scheduler).__name__}, which the config names."
        )


def check_inside(states: Any, metrics: Mapping[str, Tensor]) -> None:
    """Check what each rank saved inside an epoch: random generators and running metrics.

    Args:
        states: the checkpoint's ``inside``.
        metrics: running metrics of this run.

    Raises:
        ConfigError: something is missing or of another size.
    """
    known = isinstance(states, list) and all(
        isinstance(state, dict)
        and _is_generator(state.get("cpu_rng"))
        and ("cuda_rng" in state and (state["cuda_rng"] is None or _is_generator(state["cuda_rng"])))
        and isinstance(state.get("metrics"), dict)
        and set(state["metrics"]) == set(metrics)
        and all(isinstance(value, Tensor) and value.shape == () for value in state["metrics"].values())
        for state in states
    )
    if not known:
        raise ConfigError("the state inside an epoch is corrupt.")


def _is_generator(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1


def _is_alike(value: Any, own: Any) -> bool:
    """Return True if a saved value may stand for one of a fresh scheduler: numbers for numbers, text for text."""
    if own is None or value is None:
        return True
    if isinstance(own, int | float):
        return isinstance(value, int | float)
    if isinstance(own, list | tuple):
        return isinstance(value, list | tuple) and all(_is_alike(each, own[0]) for each in value if own)
    return isinstance(value, type(own))


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """Return a small parameter of zeros with as many dimensions, and a gradient if the parameter is to be trained."""
    if parameter.ndim > len(SIDES):
        raise ConfigError(f"a parameter has {parameter.ndim} dimensions, more than {len(SIDES)}.")
    sides = SIDES[: parameter.ndim]
    small = nn.Parameter(torch.zeros(sides, dtype=parameter.dtype, device=parameter.device), parameter.requires_grad)
    small.grad = torch.zeros_like(small) if parameter.requires_grad else None
    return small


def _check_state(found: Any, expected: Mapping[str, Any], parameter: nn.Parameter) -> None:
    """Compare the loaded state of one parameter with that of its stand-in.

    Raises:
        ConfigError: names the entry.
    """
    if not isinstance(found, dict) or set(found) != set(expected):
        raise ConfigError("the state of the optimizer is that of another optimizer.")
    real = dict(zip(SIDES, parameter.shape, strict=False))
    for name, value in expected.items():
        loaded = found[name]
        if isinstance(value, Tensor):
            shape = tuple(real.get(side, side) for side in value.shape)
            if not isinstance(loaded, Tensor) or tuple(loaded.shape) != shape or not _is_dense(loaded):
                raise ConfigError(f"the optimizer's {name} is corrupt: expected a tensor {shape}.")
        elif not _is_alike(loaded, value):
            raise ConfigError(f"the optimizer's {name} is corrupt.")


def _is_dense(tensor: Tensor) -> bool:
    """Return True if every value has a place of its own in memory, one after the other in some order."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return False
    expected = 1
    for stride, side in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if side > 1 and stride != expected:
            return False
        expected *= side
    return True
