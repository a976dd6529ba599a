"""Seeds trained as one network compute what each computes alone."""

from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from lightning import seed_everything

from alexnet_pl.benchmark.components import make_data
from alexnet_pl.benchmark.loops import make_config
from alexnet_pl.benchmark.seeds import StackedSeeds
from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.data.loaders import TensorLoader
from alexnet_pl.data.transforms import normalize

CPU = torch.device("cpu")
SMALL = ("model.channels=[8,8,8,8,8]", "model.fc_width=16", "model.dropout=0", "trainer.precision=32-true",
         "data.batch_size=16")  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "lrn"])
def test_stacked_seeds_compute_what_each_computes_alone(norm):
    cfg = make_config("cpu", Path("unused"), f"model/norm={norm}", *SMALL)
    train = cast(TensorLoader, make_data(cfg, 100, CPU).train_dataloader())
    stacked = StackedSeeds(cfg, train, [3, 5], CPU)
    batches = stacked.batches(epoch=0)[:3]
    assert not torch.equal(batches[:, 0], batches[:, 1])  # each has its own order
    losses = torch.stack([stacked.step(indices) for indices in batches])
    for place, seed in enumerate((3, 5)):
        seed_everything(seed, verbose=False)
        net = instantiate(cfg.model)
        optimizer = torch.optim.Adam(net.parameters(), lr=cfg.optimizer.lr)
        for step, indices in enumerate(batches[:, place]):
            loss = F.cross_entropy(
                net(normalize(train.images[indices], stacked.mean, stacked.std)), train.labels[indices]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(losses[step, place], loss.detach(), rtol=1e-4, atol=1e-5)
        for name, value in net.state_dict().items():
            torch.testing.assert_close(stacked.weights(place)[name], value, rtol=1e-3, atol=2e-4, msg=name)
