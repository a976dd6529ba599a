"""One run from a config: seed → build → fit → test the best checkpoint → write result.json → return the score."""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict

from alexnet_pl.callbacks import EpochReport, ProgressBar, ReseedEachEpoch
from alexnet_pl.classifier import ImageClassifier
from alexnet_pl.data.module import ImageDataModule
from alexnet_pl.errors import ConfigError
from alexnet_pl.metrics_csv import MetricsCSV
from alexnet_pl.results import device_name, git_commit, package_versions, results_table, write_result

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Train and test what ``cfg`` (``conf/train.yaml``) describes, into the folder ``cfg.run_dir``.

    Returns:
        The best validation accuracy, in [0, 1]: what a sweep maximises. Never a test figure.

    Raises:
        ConfigError: a setting that cannot work; raised before any data is read.
        DataError: missing or damaged images.
    """
    quiet_lightning()
    commit = git_commit()  # now: the checkout may change while the run goes on
    run_dir = Path(cfg.run_dir)
    refuse_used_folder(run_dir)
    settle(cfg)
    seed_everything(cfg.seed, verbose=False)
    data: ImageDataModule = instantiate(cfg.data)
    if cfg.model.num_classes < len(data.class_names):
        raise ConfigError(
            f"model.num_classes={cfg.model.num_classes} is too few: the data has {len(data.class_names)} classes."
        )
    model = ImageClassifier(
        net=instantiate(cfg.model),
        num_classes=cfg.model.num_classes,
        optimizer=instantiate(cfg.optimizer),
        scheduler=instantiate(cfg.get("scheduler")),
        hyperparameters=OmegaConf.to_container(cfg, resolve=True),
    )
    callbacks = instantiate(cfg.callbacks)
    loggers = instantiate(cfg.logger)
    trainer = make_trainer(cfg, [*callbacks.values()], [*loggers.values()])

    data.prepare_data()
    data.setup()
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)  # from here on the folder holds a run
    counts, parameters = data.counts(), sum(p.numel() for p in model.net.parameters())
    device = device_name(trainer.strategy.root_device)
    log.info(f"data    {data.description}")
    log.info(f"        {counts['train']:,} train, {counts['val']:,} validation, {counts['test']:,} test images")
    side = cfg.data.image_size
    log.info(f"model   {type(model.net).__name__}, {parameters:,} parameters, input {side}×{side}")
    log.info(f"device  {device}, precision {cfg.trainer.precision}")
    log.info(f"run     {run_dir}")

    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - start
    test = trainer.test(model, datamodule=data, ckpt_path=callbacks.best.best_model_path, verbose=False)[0]

    metrics: MetricsCSV = loggers.csv
    best_epoch = torch.load(callbacks.best.best_model_path, weights_only=True, map_location="cpu")["epoch"] + 1
    metrics.record(best_epoch, test)
    rows = metrics.rows
    result: dict[str, Any] = {
        "status": "finished",
        **{f"val/{name}": rows[best_epoch][f"val/{name}"] for name in ("acc", "acc_top5", "loss")},
        **{f"test/{name}": test[f"test/{name}"] for name in ("acc", "acc_top5", "loss")},
        "best_epoch": best_epoch,
        "epochs": len(rows),
        "seconds": seconds,
        "images_per_second": sum(row["images_per_second"] for row in rows.values()) / len(rows),
        "data": {"name": data.name, "source": data.description, **counts},
        "model": type(model.net).__name__,
        "parameters": parameters,
        "device": device,
        "precision": cfg.trainer.precision,
        "seed": cfg.seed,
        "split_seed": cfg.split_seed,
        "versions": package_versions(),
        "git_commit": commit,
    }
    write_result(run_dir / "result.json", result)
    log.info(f"\n{results_table(result)}\n")
    log.info(f"best epoch {best_epoch} of {len(rows)}, {seconds:.0f} s, {result['images_per_second']:,.0f} images/s")
    log.info(f"run folder {run_dir}")
    return result["val/acc"]


def settle(cfg: DictConfig) -> None:
    """Replace what is left to the machine or to another key by what it comes to, so that config.yaml says it.

    ``trainer.precision=auto`` becomes the precision for the device; a ``data.image_size`` of its own becomes the
    size that the network is built for.
    """
    with open_dict(cfg):
        cfg.model.image_size = cfg.data.image_size
        if cfg.trainer.precision == "auto":
            cfg.trainer.precision = default_precision(cfg.trainer.accelerator)


def default_precision(accelerator: str) -> str:
    """``16-mixed`` on a CUDA GPU, ``bf16-mixed`` on a CPU with bf16 instructions, else ``32-true``.

    A CPU without AMX or AVX512-bf16 emulates bf16, many times slower than float32.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "16-mixed"
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())
    if on_cpu and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16-mixed"
    return "32-true"


def make_trainer(cfg: DictConfig, callbacks: list[Any], loggers: list[Any]) -> Trainer:
    """The trainer of ``cfg.trainer`` with the callbacks that every run has; a progress bar on a terminal only."""
    from rich import get_console

    on_terminal = get_console().is_terminal
    bar = [ProgressBar()] if on_terminal else []
    callbacks = [*callbacks, ReseedEachEpoch(cfg.seed), EpochReport(), *bar]
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, enable_progress_bar=on_terminal)


def refuse_used_folder(run_dir: Path) -> None:
    """A second run in a folder would mix its files with the first one's.

    Raises:
        ConfigError: the folder holds a run.
    """
    if (run_dir / "config.yaml").exists():
        raise ConfigError(f"{run_dir} already holds a run. Choose another hydra.run.dir, or delete that folder.")


def quiet_lightning() -> None:
    """Keep Lightning's banners out of the log; its warnings stay, but for two that nobody here can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # between lightning and newer torch
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")  # nothing is logged by step
