"""Helper of the data tests: a data module from config overrides."""

from helpers import config
from hydra.utils import instantiate

from alexnet_pl.data.datamodule import ImageDataModule


def data_module(*overrides: str) -> ImageDataModule:
    """Return the data module of LeNet-5 with ``overrides``, prepared and set up."""
    module = instantiate(config("model=lenet5", *overrides).data)
    module.prepare_data()
    module.setup()
    return module
