"""Differences between images at the start of training, which made start.csv beside this file.

    python docs/results/plateau/start.py DIR > docs/results/plateau/start.csv

For docs/paper-network.md: how far apart the logits and the units of fc7 of 64 test images are in the network of
``experiment=paper_imagenet`` at 227×227 pixels, by initialization and input scale, without dropout. The images are
DIR/test/<class>/*.jpg of CIFAR-10, evenly spaced over the sorted files.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor, nn

import alexnet_pl

STDS = {"unit variance": 0.247, "0-255": 1 / 255}
"""Input scale → what pixels in [0, 1] are divided by, after their mean was subtracted."""
IMAGES, SIZE = 64, 227


def outputs(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the units of fc7, which fc8 reads, and the logits."""
    read: list[Tensor] = []
    net.get_submodule("classifier.fc8").register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        logits = net(images)
    return read[-1], logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    files = sorted(parser.parse_args().root.glob("test/*/*.jpg"))
    files = files[:: len(files) // IMAGES][:IMAGES]
    pixels = np.stack([np.asarray(Image.open(file).resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for file in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    images -= torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)  # of CIFAR-10's training images

    rows = []
    for seed in (1, 2, 3):
        for initialization in ("paper", "released_code"):
            cfg = alexnet_pl.compose(["model=alexnet_paper", "model.num_classes=10",
                                      f"model.initialization={initialization}"])  # fmt: skip
            torch.manual_seed(seed)
            net = instantiate(cfg.model).eval()
            for scale, std in STDS.items():
                fc7, logits = outputs(net, images / std)
                rows.append({
                    "initialization": initialization, "input": scale, "seed": seed,
                    "std of a logit": logits.std(0).mean().item(),
                    "std of a unit of fc7, relative to the mean": (fc7.std(0).mean() / fc7.mean()).item(),
                })  # fmt: skip
    table = pd.DataFrame(rows)
    table["images"], table["pixels"], table["torch"] = IMAGES, SIZE, torch.__version__.partition("+")[0]
    print(table.to_csv(index=False), end="")


if __name__ == "__main__":
    main()
