"""Train an image classifier: ``python train.py model=alexnet_lrn data=cifar10``. See ``python train.py --help``."""

import hydra
from omegaconf import DictConfig, OmegaConf

from alexnet_pl.errors import one_line_errors

OmegaConf.register_new_resolver("first", lambda *values: next(value for value in values if value is not None))


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    with one_line_errors():
        from alexnet_pl.training import run  # torch is loaded only once Hydra knows that there is something to run

        return run(cfg)


if __name__ == "__main__":
    with one_line_errors():
        main()
