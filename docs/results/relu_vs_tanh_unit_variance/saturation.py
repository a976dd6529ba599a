"""Units of the first layer that are saturated after training, which made saturation.csv beside this file.

    python docs/results/relu_vs_tanh_unit_variance/saturation.py DIR RUN... > saturation.csv

For docs/results/README.md: the share of the first tanh's outputs beyond 0.98, where its slope is below 4%,
on 1,000 test images, by trained run of ``experiment=relu_vs_tanh_2012`` and ``relu_vs_tanh_unit_variance``. The images
are DIR/test/<class>/*.jpg of CIFAR-10, evenly spaced over the sorted files.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

import alexnet_pl

IMAGES, LIMIT = 1_000, 0.98


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    args = parser.parse_args()
    files = sorted(args.root.glob("test/*/*.jpg"))
    files = files[:: len(files) // IMAGES][:IMAGES]
    rows = []
    for name in args.runs:
        run = alexnet_pl.load_run(name)
        images = torch.cat([run.preprocess(Image.open(file)) for file in files])
        first = next(module for module in run.net.modules() if isinstance(module, nn.Tanh))
        outputs: list[Tensor] = []
        first.register_forward_hook(lambda *called, to=outputs: to.append(called[2]))
        with torch.no_grad():
            run.net.eval()(images)
        share = (outputs[0].abs() > LIMIT).double().mean().item()
        config = run.config
        rows.append({"study": config["study"], "seed": config["seed"], "epoch": run.epoch, "saturated": share})
    print(pd.DataFrame(rows).assign(images=IMAGES, limit=LIMIT).to_csv(index=False), end="")


if __name__ == "__main__":
    main()
