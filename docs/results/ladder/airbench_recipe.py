"""The recipe of cifar10-airbench on the JPEG copy of CIFAR-10, which made airbench-recipe.csv beside this file.

    OMP_NUM_THREADS=1 python docs/results/ladder/airbench_recipe.py DIR airbench
    OMP_NUM_THREADS=1 python docs/results/ladder/airbench_recipe.py DIR alexnet_modern

A control for docs/ladder.md: written after the description of the recipe (Jordan 2024, arXiv:2404.00498), and
independent of this project's training, data path and networks, so that a fault in one of them does not show in both.
The images are DIR/train/<class>/*.jpg. Prints one line of CSV per epoch, and at the end the accuracy over six views.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

BATCH, MOMENTUM, EPOCHS = 1024, 0.85, 9.9
PER_EXAMPLE = 1024 * (1 + 1 / (1 - MOMENTUM))
RATE, DECAY = 11.5 / PER_EXAMPLE, 0.0153 * BATCH / PER_EXAMPLE  # of the loss summed over a batch
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)


class Norm(nn.BatchNorm2d):
    """BatchNorm whose scale stays 1."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False


def convolution(before: int, after: int) -> nn.Conv2d:
    """Return a 3×3 convolution that starts as the identity on its first ``before`` feature maps."""
    layer = nn.Conv2d(before, after, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.data[:before])
    return layer


class Network(nn.Module):
    """A whitening layer with a bias that learns for three epochs, then 3×3 convolutions and linear layers.

    Args:
        channels: feature maps of the convolutions.
        pool_after: numbers of the convolutions that 2×2 max pooling follows, before BatchNorm and GELU.
        hidden: units of the hidden linear layers; without them the last feature maps are pooled to one pixel.
    """

    def __init__(self, channels: tuple[int, ...], pool_after: tuple[int, ...], hidden: tuple[int, ...]):
        super().__init__()
        self.whitening = nn.Conv2d(3, 24, 2)
        self.whitening.weight.requires_grad = False
        self.whitening.bias.data.zero_()
        self.pool_after, widths = pool_after, (24, *channels)
        self.convs = nn.ModuleList(convolution(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.conv_norms = nn.ModuleList(Norm(width) for width in channels)
        units = (channels[-1] * (31 // 2 ** len(pool_after)) ** 2 if hidden else channels[-1], *hidden)
        self.linears = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in zip(units, units[1:], strict=False))
        self.linear_norms = nn.ModuleList(Norm(width) for width in hidden)
        self.last = nn.Linear(units[-1], 10, bias=False)

    def forward(self, images: Tensor, bias_learns: bool = True) -> Tensor:
        """Return logits ``(N, 10)`` for normalized images ``(N, 3, 32, 32)``."""
        bias = self.whitening.bias if bias_learns else self.whitening.bias.detach()
        maps = F.gelu(F.conv2d(images, self.whitening.weight, bias))
        for number, (conv, norm) in enumerate(zip(self.convs, self.conv_norms, strict=True), start=1):
            maps = conv(maps)
            maps = F.gelu(norm(F.max_pool2d(maps, 2) if number in self.pool_after else maps))
        units = maps.flatten(1) if self.linears else F.max_pool2d(maps, 3).flatten(1)
        for linear, norm in zip(self.linears, self.linear_norms, strict=True):
            units = F.gelu(norm(linear(units)[:, :, None, None]).flatten(1))
        return self.last(units) / 9


NETWORKS = {
    "airbench": ((64, 64, 256, 256, 256, 256), (1, 3, 5), ()),
    "alexnet_modern": ((64, 256, 256, 256, 256), (1, 2, 5), (512, 512)),
}


def read(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 45,000 normalized training images and labels, and 5,000 for validation, 500 of each class."""
    generator = torch.Generator().manual_seed(0)
    pixels, labels, held_out = [], [], []
    for label, folder in enumerate(sorted(path for path in (root / "train").iterdir() if path.is_dir())):
        files = sorted(folder.glob("*.jpg"))
        pixels += [np.asarray(Image.open(file).convert("RGB")) for file in files]
        labels += [label] * len(files)
        chosen = torch.zeros(len(files), dtype=torch.bool)
        chosen[torch.randperm(len(files), generator=generator)[:500]] = True
        held_out.append(chosen)
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    targets, val = torch.tensor(labels), torch.cat(held_out)
    return images[~val], targets[~val], images[val], targets[val]


def whitening_filters(images: Tensor) -> Tensor:
    """Return ``(24, 3, 2, 2)``: the principal components of 2×2 patches at unit variance, with both signs."""
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    variances, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors.T / torch.sqrt(variances.view(-1, 1) + 5e-4)).flip(0).view(12, 3, 2, 2)
    return torch.cat([filters, -filters])


def crops(images: Tensor, padding: int = 2) -> Tensor:
    """Return each image shifted by up to ``padding`` pixels either way, with a reflected border."""
    padded, count, pixel = F.pad(images, (padding,) * 4, "reflect"), len(images), torch.arange(32)
    shift = torch.randint(0, 2 * padding + 1, (count, 2))
    rows, columns = (shift[:, :1] + pixel).view(count, 1, 32, 1), (shift[:, 1:] + pixel).view(count, 1, 1, 32)
    return padded[torch.arange(count).view(-1, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1), rows, columns]


@torch.no_grad()
def accuracy(network: Network, images: Tensor, labels: Tensor, views: int = 1) -> float:
    """Return the fraction of images that are classified correctly by one view, or by six as in airbench."""

    def mirrored(batch: Tensor) -> Tensor:
        return 0.5 * network(batch).float() + 0.5 * network(batch.flip(-1)).float()

    network.eval()
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for batch in images.split(1000):
            if views == 1:
                logits = network(batch).float()
            else:
                padded = F.pad(batch, (1,) * 4, "reflect")
                shifted = 0.25 * mirrored(padded[:, :, :32, :32]) + 0.25 * mirrored(padded[:, :, 2:, 2:])
                logits = 0.5 * mirrored(batch) + shifted
            found.append(logits.argmax(1))
    network.train()
    return (torch.cat(found) == labels).float().mean().item()


def average(slow: dict[str, Tensor], network: Network, decay: float) -> None:
    """Move the slow weights towards the network's, and set the network to them (lookahead)."""
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                slow[name].lerp_(value, 1 - decay)
                value.copy_(slow[name])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a network by the recipe of cifar10-airbench.")
    parser.add_argument("root", type=Path, metavar="DIR", help="directory with train/<class>/*.jpg")
    parser.add_argument("network", choices=[*NETWORKS])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="stop after this many, to try it")
    args = parser.parse_args()

    images, labels, val_images, val_labels = read(args.root)
    torch.manual_seed(args.seed)
    network = Network(*NETWORKS[args.network])
    network.whitening.weight.data[:] = whitening_filters(images[:5000])
    learned = {name: value for name, value in network.named_parameters() if value.requires_grad}
    biases = [value for name, value in learned.items() if "norms" in name]
    others = [value for name, value in learned.items() if "norms" not in name]
    optimizer = torch.optim.SGD(
        [
            {"params": biases, "lr": RATE * 64, "weight_decay": DECAY / (RATE * 64)},
            {"params": others, "lr": RATE, "weight_decay": DECAY / RATE},
        ],
        momentum=MOMENTUM, nesterov=True,
    )  # fmt: skip
    total = int(EPOCHS * math.ceil(len(images) / BATCH))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(np.interp(step, [0, int(0.23 * total), total], [0.2, 1, 0.07]))
    )
    slow = {name: value.clone().float() for name, value in network.state_dict().items()}
    mirrored_first = torch.rand(len(images)) < 0.5
    start, step, epoch = time.time(), 0, 0
    print("epoch,train_acc,val_acc,seconds")
    while step < total:
        right = seen = 0
        for chosen in torch.randperm(len(images)).split(BATCH):
            if step in (total, args.steps):
                break
            mirrored = (mirrored_first[chosen] ^ (epoch % 2 == 1)).view(-1, 1, 1, 1)
            batch = crops(images[chosen])
            batch = torch.where(mirrored, batch.flip(-1), batch)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(batch, bias_learns=epoch < 3)
            losses = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.2, reduction="none")
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            scheduler.step()
            step += 1
            right += int((logits.argmax(1) == labels[chosen]).sum())
            seen += len(chosen)
            if step % 5 == 0:
                average(slow, network, 0.95**5 * (step / total) ** 3)
        if step == total:
            average(slow, network, 1.0)
        epoch += 1
        one = accuracy(network, val_images, val_labels)
        print(f"{epoch},{right / seen:.4f},{one:.4f},{time.time() - start:.0f}", flush=True)
        if step == args.steps:
            break
    print(f"six views: {accuracy(network, val_images, val_labels, views=6):.4f}")


if __name__ == "__main__":
    main()
