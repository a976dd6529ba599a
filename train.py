"""Train a network: ``python train.py model=alexnet_lrn data=cifar10``. The same as ``alexnet train …``."""

from alexnet_pl.cli.train import main

if __name__ == "__main__":
    main()
