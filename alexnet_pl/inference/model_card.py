"""Write a model card for a trained run: ``python -m alexnet_pl card RUN``; see ``--help``."""

from collections.abc import Sequence
from typing import Any

from alexnet_pl.inference.trained_run import TrainedRun
from alexnet_pl.runtime.errors import UserError

DATA_SOURCES = {
    "cifar10": (
        "CIFAR-10: 60,000 colour images of 32×32 pixels in ten classes, a labelled part of the 80 Million Tiny Images "
        "(A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009). Its authors name no licence; "
        "the pictures were collected from the web, and the collection they are from was withdrawn in 2020 for "
        "offensive labels and pictures."
    ),
    "digits": (
        "scikit-learn's handwritten digits: 1,797 grey images of 8×8 pixels, the test part of the UCI set *Optical "
        "Recognition of Handwritten Digits* (E. Alpaydin and C. Kaynak, 1998; CC BY 4.0)."
    ),
}
"""What a data module's name stands for, with its source and licence."""


def card(run: TrainedRun) -> str:
    """The model card of a finished run, Markdown with a YAML header.

    Raises:
        UserError: the run has no result.json to take the figures from.
    """
    if run.result is None:
        raise UserError(
            f"{run.folder} has no result.json beside this checkpoint, which a card takes its figures from: "
            "the run has not ended, or this is not its best checkpoint."
        )
    result, config = run.result, run.config
    sections = [
        ("Model", model_section(run)),
        ("Intended use", use_section(run)),
        ("Training data", data_section(result)),
        ("Training recipe", recipe_section(config, result)),
        ("Results", results_section(run)),
        ("Limits", limits_section(run)),
        ("How to use it", how_section(run)),
        ("Licence", "The code and these weights: MIT. The licence of the data is its own: see *Training data*."),
    ]
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    return f"{header(run)}\n\n# {run.name}\n\n{body}\n"


def header(run: TrainedRun) -> str:
    """The YAML block that model hubs read."""
    result = run.result
    return "\n".join(
        [
            "---",
            "license: mit",
            "library_name: pytorch",
            "pipeline_tag: image-classification",
            "tags: [image-classification, alexnet, pytorch-lightning]",
            "model-index:",
            f"- name: {run.name}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {result['data']['name']}, type: {result['data']['name']}, split: test}}",
            "    metrics:",
            f"    - {{type: accuracy, value: {result['test/acc']:.4f}}}",
            "---",
        ]
    )


def model_section(run: TrainedRun) -> str:
    size, names = run.preprocess.image_size, ", ".join(run.class_names)
    result = run.result
    return table(
        [
            ("network", f"{result['model']}, {result['parameters']:,} parameters"),
            ("input", f"RGB, resized to {size}×{size}, bilinear with antialiasing"),
            ("normalisation", f"(x / 255 − mean) / std, mean {[*run.preprocess.mean]}, std {[*run.preprocess.std]}"),
            ("output", f"logits of {len(run.class_names)} classes: {names}"),
            ("layers", ", ".join(f"{key}: {value}" for key, value in layers(run.config["model"]).items())),
            ("checkpoint", f"epoch {run.epoch} of {result['epochs']}, the best by validation accuracy"),
            (
                "code",
                f"alexnet_pl {result['versions'].get('alexnet_pl', '')}, commit {result['git_commit'] or 'unknown'}",
            ),
        ]
    )


def use_section(run: TrainedRun) -> str:
    return (
        f"Sorting pictures like those of {run.result['data']['name']} into its {len(run.class_names)} classes; "
        "study of the 2012 network. Not for decisions about people, nor where a mistake is costly."
    )


def data_section(result: dict[str, Any]) -> str:
    data = result["data"]
    known = DATA_SOURCES.get(data["name"], f"{data['name']}; its source and licence are not known to this program.")
    copy = data["source"].partition(" in ")[0]  # without the folder, which is of one machine
    return (
        f"{known}\n\nCopy used: {copy}. {data['train']:,} images to train on, {data['val']:,} held out for validation "
        f"by a stratified split (`split_seed={result['split_seed']}`), {data['test']:,} to test on, read once, "
        "with the best checkpoint."
    )


def recipe_section(config: dict[str, Any], result: dict[str, Any]) -> str:
    scheduler = config.get("scheduler")
    return table(
        [
            ("optimiser", described(config["optimizer"])),
            ("learning rate schedule", described(scheduler) if scheduler else "constant"),
            ("batch", f"{config['data']['batch_size']} images"),
            ("epochs", str(result["epochs"])),
            ("augmentation", described(config["augment"])),
            ("precision", result["precision"]),
            ("seed", str(result["seed"])),
            ("hardware", result["device"]),
            ("time", f"{result['seconds']:,.0f} s, {result['images_per_second']:,.0f} images/s in training"),
            ("versions", ", ".join(f"{name} {number}" for name, number in result["versions"].items())),
        ]
    )


def results_section(run: TrainedRun) -> str:
    result = run.result
    lines = ["| split | images | loss (nats) | top-1 error | top-5 error |", "|---|---|---|---|---|"]
    for split, name in (("val", "validation"), ("test", "test")):
        loss, top1, top5 = (result[f"{split}/{key}"] for key in ("loss", "acc", "acc_top5"))
        lines.append(f"| {name} | {result['data'][split]:,} | {loss:.4f} | {1 - top1:.4f} | {1 - top5:.4f} |")
    low, high = wilson_interval(result["test/acc"], result["data"]["test"])
    return "\n".join(
        [
            *lines,
            "",
            f"Test accuracy {result['test/acc']:.4f}, 95% interval {low:.4f} to {high:.4f} (Wilson), which counts the "
            f"chance in the choice of {result['data']['test']:,} test images and nothing else: this is one seed. The "
            "checkpoint was chosen by its validation accuracy, so that the validation figures are optimistic.",
        ]
    )


def limits_section(run: TrainedRun) -> str:
    side, kept = run.preprocess.resize_size or run.preprocess.image_size, run.preprocess.image_size
    cut = f", and only the middle {kept}×{kept} of that is looked at" if kept < side else ""
    return "\n".join(
        [
            "- It answers with one of its classes whatever the picture shows; there is no *none of these*.",
            f"- Pictures are squeezed to {side}×{side}{cut}: small things vanish.",
            "- Probabilities are the softmax as trained; `alexnet_pl.evaluate` gives its calibration error.",
            "- Nothing was measured on other data, on corrupted pictures, or by groups of people.",
            "- `result.json` is from the device and precision above; another device may differ in the last digits.",
        ]
    )


def how_section(run: TrainedRun) -> str:
    return (
        "```python\nfrom alexnet_pl import load_run\nfrom PIL import Image\n\n"
        'run = load_run("best.ckpt")\n'
        'probabilities = run.probabilities(run.preprocess(Image.open("picture.jpg")))[0]\n'
        "print(dict(zip(run.class_names, probabilities.tolist())))\n```"
    )


def layers(model: dict[str, Any]) -> dict[str, str]:
    """The network's settings, factories by their class's name."""
    return {
        name: described(value) if isinstance(value, dict) else str(value)
        for name, value in model.items()
        if name not in ("_target_", "num_classes", "image_size")
    }


def described(section: dict[str, Any]) -> str:
    """A configuration section in one line: ``Adam (lr 0.001, fused True)``."""
    name = section["_target_"].rpartition(".")[2]
    if name == "Identity":
        return "none"
    settings = ", ".join(f"{key} {value}" for key, value in section.items() if not key.startswith("_"))
    return f"{name} ({settings})" if settings else name


def wilson_interval(fraction: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a fraction of ``count`` trials (E. B. Wilson 1927)."""
    centre = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (fraction * (1 - fraction) / count + z**2 / (4 * count**2)) ** 0.5
    return centre - half, centre + half


def table(rows: Sequence[tuple[str, str]]) -> str:
    """A Markdown table without a head."""
    cells = [f"| {name} | {value.replace('|', '∣')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *cells])
