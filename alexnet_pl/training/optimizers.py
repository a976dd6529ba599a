"""Optimizers that torch does not have: Muon for matrices and convolutions, with AdamW for all other parameters."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from alexnet_pl.config.torch_internals import has_bf16_instructions
from alexnet_pl.runtime.errors import invalid_value

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan's quintic iteration, which maps singular values in (0, 1] to between about 0.7 and 1.2."""


class Muon(Optimizer):
    """Momentum whose update is orthogonalized (Jordan 2024), for matrices and convolutions; AdamW for the rest.

    The rest are vectors, biases of any shape in a group of their own (``parameter_groups``), and weights with other
    than two or four dimensions, such as those of locally connected layers. Convolutions count as matrices with one row
    per output channel, those with several groups as one matrix per group, whose rows read the same inputs.
    ``torch.optim.Muon`` takes matrices only and no other parameters. With momentum buffer
    ``B ← momentum · B + (1 − momentum) · G``, the update of a weight is
    ``W ← W − lr · (weight_decay · W + √max(1, rows / columns) · orthogonal(B))``, where Nesterov's variant takes
    ``momentum · B + (1 − momentum) · G`` instead of B. Source: kellerjordan.github.io/posts/muon.

    Args:
        params: parameters, or groups of them. Each group is divided into its matrices and the rest.
        lr: learning rate of the matrices.
        momentum: weight of the previous buffer, in [0, 1).
        nesterov: look one step ahead.
        weight_decay: decoupled as in AdamW, for all parameters; 0 or more.
        newton_schulz_steps: iterations of :func:`orthogonalize`, at least 1.
        bfloat16: iterate in bfloat16, as the author does, instead of float32; None where it is faster: on a GPU and on
            a CPU with bf16 instructions.
        adamw_lr: learning rate of the rest; groups and schedules scale it as they scale ``lr``.
        betas, eps: of AdamW.

    Attributes:
        parts: number of groups of the convolutions that have several, by weight.

    Raises:
        ConfigError: a value out of range.
    """

    weights_apart = True
    """For ``OptimizerFactory``: groups of biases and norms hold no weights, which Muon could not tell apart."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        newton_schulz_steps: int = 5,
        bfloat16: bool | None = None,
        adamw_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        for name, value in (("lr", lr), ("adamw_lr", adamw_lr), ("eps", eps)):
            if not 0 < value < math.inf:
                raise invalid_value(f"optimizer.{name}", value, "a number above 0")
        for name, value in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= value < 1:
                raise invalid_value(f"optimizer.{name}", value, "a number from 0 to below 1")
        if not 0 <= weight_decay < math.inf:
            raise invalid_value("optimizer.weight_decay", weight_decay, "a number ≥ 0")
        if newton_schulz_steps < 1:
            raise invalid_value("optimizer.newton_schulz_steps", newton_schulz_steps, "a whole number ≥ 1")
        # Without betas, which torch's schedules would cycle instead of the momentum.
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
                    "newton_schulz_steps": newton_schulz_steps}  # fmt: skip
        self._bfloat16 = bfloat16
        self.parts: dict[Tensor, int] = {}
        adamw = {"betas": tuple(betas), "eps": eps}
        super().__init__(_by_shape(params, lr, adamw_lr / lr, adamw), defaults)
        self._adamw = AdamW([group for group in self.param_groups if not group["is_muon"]] or [{"params": []}])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, and return what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if group["is_muon"] else ():
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        # Both are replaced when a checkpoint is loaded.
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["is_muon"]]
        self._adamw.step()
        return loss

    def _update(self, weight: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        is_fast = weight.device.type == "cuda" or has_bf16_instructions()
        dtype = torch.bfloat16 if (is_fast if self._bfloat16 is None else self._bfloat16) else torch.float32
        matrix, steps, parts = update.flatten(1).to(dtype), group["newton_schulz_steps"], self.parts.get(weight, 1)
        scale = math.sqrt(max(1, matrix.shape[0] / parts / matrix.shape[1]))
        if parts == 1:
            matrix = orthogonalize(matrix, steps)
        else:
            stacked = matrix.reshape(parts, -1, matrix.shape[1])
            matrix = torch.vmap(orthogonalize, in_dims=(0, None))(stacked, steps)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(matrix.reshape(weight.shape).to(weight.dtype), alpha=-group["lr"] * scale)


def _by_shape(
    params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, ratio: float, adamw: dict[str, Any]
) -> list[dict[str, Any]]:
    """Divide every group into matrices, which come first, and the rest at ``ratio`` times the rate, with ``adamw``."""
    given: list[Any] = list(params)
    groups: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]
    found = []
    for is_muon in (True, False):
        for group in groups:
            are_weights = group.get("are_weights", True)
            members = [
                parameter for parameter in group["params"] if (are_weights and parameter.ndim in (2, 4)) == is_muon
            ]
            rate = group.get("lr", lr) * (1 if is_muon else ratio)
            name = " ".join([*filter(None, [group.get("name")]), "Muon" if is_muon else "AdamW"])
            settings = {} if is_muon else adamw
            if members:
                found.append({**settings, **group, "params": members, "lr": rate, "is_muon": is_muon, "name": name})
    return found


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return roughly the orthogonal factor ``U V'`` of ``matrix = U S V'``, by ``steps`` Newton–Schulz iterations.

    Each iteration maps the singular values by an odd polynomial of degree five and leaves U and V as they are. After
    five, values above about 0.01 of the Frobenius norm lie between 0.7 and 1.2.

    Args:
        matrix: ``(rows, columns)``, floating point.
    """
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
