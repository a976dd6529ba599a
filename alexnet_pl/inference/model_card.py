"""Model card of a trained run: Markdown with a YAML header, filled from the run's config and result.json."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, TemplateError, Undefined
from scipy.stats import binomtest

from alexnet_pl.inference.trained_run import TrainedRun
from alexnet_pl.runtime.errors import UserError, one_line, printable
from alexnet_pl.runtime.run_folder import CORRUPTIONS, TEST_VIEWS

DATA_SOURCES = {
    "cifar10": (
        "CIFAR-10: 60,000 color images of 32×32 pixels in ten classes, a labeled part of the 80 Million Tiny Images "
        "(A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009). Its authors name no license; "
        "the images were collected from the web, and the collection they come from was withdrawn in 2020 for "
        "offensive labels and images."
    ),
    "cifar100": (
        "CIFAR-100: 60,000 color images of 32×32 pixels in 100 classes, collected like CIFAR-10 "
        "(A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009). Its authors name no license; "
        "the collection the images come from was withdrawn in 2020 for offensive labels and images."
    ),
    "mnist": (
        "MNIST: 70,000 grayscale images of handwritten digits, 28×28 pixels (Y. LeCun, L. Bottou, Y. Bengio and "
        "P. Haffner, *Gradient-Based Learning Applied to Document Recognition*, 1998). Its license is not known to "
        "this program."
    ),
    "fashion_mnist": (
        "Fashion-MNIST: 70,000 grayscale images of clothes, 28×28 pixels (H. Xiao, K. Rasul, R. Vollgraf, 2017; MIT)."
    ),
    "kmnist": (
        "KMNIST: 70,000 grayscale images of cursive Japanese characters, 28×28 pixels (T. Clanuwat et al., *Deep "
        "Learning for Classical Japanese Literature*, 2018; CC BY-SA 4.0)."
    ),
    "svhn": (
        "SVHN: 99,289 color images of house-number digits, 32×32 pixels (Y. Netzer et al., *Reading Digits in Natural "
        "Images with Unsupervised Feature Learning*, 2011; for non-commercial use only)."
    ),
    "stl10": (
        "STL-10: 13,000 labeled color images of 96×96 pixels in ten classes, taken from ImageNet (A. Coates, H. Lee, "
        "A. Y. Ng, *An Analysis of Single-Layer Networks in Unsupervised Feature Learning*, 2011). Its authors name no "
        "license."
    ),
    "imagenette": (
        "Imagenette: 13,394 photographs in ten classes of ImageNet (J. Howard, 2019). The photographs belong to their "
        "authors; ImageNet allows non-commercial research and education."
    ),
    "digits": (
        "scikit-learn's handwritten digits: 1,797 grayscale images of 8×8 pixels, the test part of the UCI dataset "
        "*Optical Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998; CC BY 4.0)."
    ),
}
"""Name of a data module → description, source and license of its dataset, as Markdown."""


AVERAGES = ("EMA", "EMAWeightAveraging")
"""Classes of callbacks whose averaged weights the best checkpoint holds."""

PLAIN_LOSSES = ("CrossEntropyLoss", "CrossEntropyLoss (label_smoothing 0.0)")
"""Objectives that a card need not describe."""


class Markdown(str):
    """Text that is Markdown already and is not escaped again."""


def card(run: TrainedRun, address: str = "best.ckpt") -> str:
    """Return the model card of a finished run.

    Args:
        address: what ``load_run`` takes in the example of the card.

    Raises:
        UserError: the run has no result.json beside this checkpoint, or a corrupt one.
    """
    if run.result is None:
        raise UserError(
            f"{run.folder}: no result.json for this checkpoint, which the card takes its numbers from. "
            "Either the run has not finished, or this is not its best checkpoint."
        )
    try:
        return _template().render(**_values(run, run.result), address=address)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateError) as error:
        raise UserError(f"{run.folder}/result.json is corrupt or incomplete: {one_line(error)[:200]}") from error


def _values(run: TrainedRun, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables."""
    config, data, preprocess = run.config, result["data"], run.preprocess
    side = preprocess.resize_size or preprocess.image_size
    size = preprocess.image_size
    best = (config.get("callbacks") or {}).get("best") or {}
    monitor = str(best.get("monitor", "val/acc"))
    loss = config.get("loss") or {"_target_": "CrossEntropyLoss"}
    callbacks = [callback for callback in (config.get("callbacks") or {}).values() if callback]
    averages = [callback for callback in callbacks if str(callback.get("_target_")).rpartition(".")[2] in AVERAGES]
    cropped = f", and only the middle {size}×{size} of that is used" if size < side else ""
    low, high = wilson_interval(result["test/acc"], data["test"])
    unknown = f"{escape(data['name'])}; its source and license are not known to this program."
    return {
        "result": result,
        "data": data,
        "name": run.name,
        "epoch": run.epoch,
        "class_names": run.class_names,
        "side": side,
        "keep_ratio": preprocess.keep_ratio,
        "selected_by": {"val/acc": "validation accuracy", "val/loss": "validation loss"}.get(monitor, monitor),
        "has_val_folder": "; validation is val/," in data["source"],
        "has_corruptions": (run.folder / CORRUPTIONS).is_file(),
        "cropped": cropped,
        "mean": [*preprocess.mean],
        "std": [*preprocess.std],
        "layers": ", ".join(f"{key}: {value}" for key, value in layers(config["model"]).items()),
        "source": Markdown(DATA_SOURCES.get(data["name"], unknown)),
        "copy": data["source"].partition(" in ")[0],  # without the directory, which belongs to one machine
        "limits": ", ".join(f"{key}={value}" for key, value in (data.get("limits") or {}).items()),
        "optimizer": describe(config["optimizer"]),
        "scheduler": describe(config["scheduler"]) if config.get("scheduler") else "constant",
        "loss": "" if describe(loss) in PLAIN_LOSSES else describe(loss),
        "averaged": describe(averages[0]) if averages else "",
        "batch_size": config["data"]["batch_size"],
        "augmentation": describe(config["augment"]),
        "versions": ", ".join(f"{package} {version}" for package, version in result["versions"].items()),
        "results": results(result),
        "low": low,
        "high": high,
    }


def results(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the results table: validation, test and, if the run measured it, the test of several views."""
    rows = []
    for split, suffix, label in (
        ("val", "", "validation"),
        ("test", "", "test"),
        *(("test", suffix, f"test, {words}") for suffix, words in TEST_VIEWS.items()),
    ):
        if suffix and f"{split}/acc{suffix}" not in result:
            continue
        loss, top1, top5 = (float(result[f"{split}/{name}{suffix}"]) for name in ("loss", "acc", "acc_top5"))
        images = int(result["data"][split])
        rows.append({"split": label, "images": images, "loss": loss, "top1": 1 - top1, "top5": 1 - top5})
    return rows


def layers(model: Mapping[str, Any]) -> dict[str, str]:
    """Return the network's settings; layer factories are named by their class."""
    return {
        name: describe(value) if isinstance(value, dict) else str(value)
        for name, value in model.items()
        if name not in ("_target_", "num_classes", "image_size")
    }


def describe(section: Mapping[str, Any]) -> str:
    """Return a config section in one line: ``Adam (lr 0.001, fused True)``."""
    name = str(section["_target_"]).rpartition(".")[2]
    if name == "Identity":
        return "none"
    settings = ", ".join(f"{key} {value}" for key, value in section.items() if not key.startswith("_"))
    return f"{name} ({settings})" if settings else name


def wilson_interval(fraction: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a fraction of ``count`` trials (E. B. Wilson 1927).

    Raises:
        ValueError: a fraction outside [0, 1], or no trials.
    """
    interval = binomtest(round(fraction * count), count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


# --- template -------------------------------------------------------------------------------------------------------


def escape(value: Any) -> str:
    """Return a value as Markdown text on one line that renders as itself: no markup, links, HTML or table cells."""
    if isinstance(value, Markdown | Undefined):
        return str(value)  # an undefined value raises
    text = printable(" ".join(str(value).split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
    return re.sub(r"(?i)\b(https?|ftp|www)(:|\.)", r"\1\\\2", text)  # GitHub links plain addresses


def _quote(value: Any) -> Markdown:
    """Return a value as a quoted YAML string, which is JSON's, without HTML."""
    return Markdown(json.dumps(printable(str(value))).replace("<", "\\u003c"))


@lru_cache
def _template() -> Template:
    """Return the template; every value it prints is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8"),
        autoescape=False,  # that would be HTML's; finalize escapes Markdown instead
        finalize=escape,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = _quote
    return environment.get_template("model_card.md.jinja")
