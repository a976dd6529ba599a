"""Training of several seeds in one process: their weights are stacked, and ``torch.func.vmap`` runs all as one network.

Small networks leave a GPU idle between kernels. Stacked, a kernel computes all seeds. Each seed has its own
initialization, image order and dropout masks; what one seed computes does not depend on the others.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import seed_everything
from omegaconf import DictConfig
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from alexnet_pl.benchmark.loops import AUTOCAST_DTYPES
from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.data.loaders import EpochShuffle, TensorLoader
from alexnet_pl.data.transforms import normalize


class StackedSeeds:
    """Adam on the stacked weights of one network per seed.

    Args:
        cfg: config of the run: network, precision, batch size and learning rate.
        train: loader of the run, whose images, labels and split are used.
        seeds: one network each.
        device: device of the networks and the images.
    """

    def __init__(self, cfg: DictConfig, train: TensorLoader, seeds: Sequence[int], device: torch.device):
        self.seeds, self.batch_size, self.device = tuple(seeds), int(cfg.data.batch_size), device
        self.images, self.labels, self.indices = train.images, train.labels, train.indices.to(device)
        self.mean, self.std = tuple(cfg.data.mean), tuple(cfg.data.std)
        self.dtype = AUTOCAST_DTYPES.get(str(cfg.trainer.precision))
        nets = []
        for seed in seeds:
            seed_everything(seed, verbose=False)
            nets.append(instantiate(cfg.model).to(device))
        self.parameters, self.buffers = stack_module_state(nets)
        self.template = copy.deepcopy(nets[0]).to("meta")
        # The scaler of float16 is left out: bf16 and float32 need none, and the arithmetic per step is the same.
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=cfg.optimizer.lr, fused=True)
        self._gradients = vmap(grad_and_value(self._loss, has_aux=True), randomness="different")

    def _loss(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        updated = {name: value.clone() for name, value in buffers.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = functional_call(self.template, (parameters, updated), (images,))
        return F.cross_entropy(logits.float(), labels), updated

    def step(self, indices: Tensor) -> Tensor:
        """Train every seed on its own batch of image indices, ``(seeds, B)``, and return their losses ``(seeds,)``."""
        images = normalize(self.images.index_select(0, indices.flatten()), self.mean, self.std)
        images = images.unflatten(0, indices.shape)
        labels = self.labels.index_select(0, indices.flatten()).view_as(indices)
        gradients, (losses, buffers) = self._gradients(self.parameters, self.buffers, images, labels)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        self.optimizer.step()
        with torch.no_grad():
            for name, buffer in buffers.items():
                self.buffers[name].copy_(buffer)
        result: Tensor = losses.detach()
        return result

    def batches(self, epoch: int) -> Tensor:
        """Return the image indices of an epoch, ``(steps, seeds, B)``, each seed in the order of a run of its own."""
        orders = []
        for seed in self.seeds:
            shuffle = EpochShuffle(len(self.indices), seed)
            shuffle.set_epoch(epoch)
            orders.append(self.indices[shuffle.order().to(self.device)])
        steps = len(self.indices) // self.batch_size
        whole = torch.stack(orders)[:, : steps * self.batch_size]
        batches: Tensor = whole.unflatten(1, (steps, self.batch_size)).movedim(1, 0)
        return batches

    def weights(self, place: int) -> dict[str, Any]:
        """Return the state dict of one seed's network."""
        return {name: value[place].detach() for name, value in {**self.parameters, **self.buffers}.items()}
