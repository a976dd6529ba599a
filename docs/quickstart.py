# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train, look inside, compare
#
# A small AlexNet on scikit-learn's handwritten digits: a few minutes on two CPU cores, no download, no GPU. Where the
# package is not installed, as on Colab, the next cell installs it.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("alexnet_pl") is None:
    source = ""  # "git+https://github.com/OWNER/alexnet_pl", or the path of a wheel; the package index does not have it
    if not source:
        raise SystemExit("alexnet_pl is not installed. Set source, in this cell, to where pip finds it.")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

import alexnet_pl

# %% [markdown]
# ## Train
# `alexnet_pl.train` takes the overrides of `alexnet train`, as text or as keywords, and returns the finished run.
# `experiment="quickstart"` is AlexNet with local response normalization at a twentieth of its width.

# %%
run = alexnet_pl.train(experiment="quickstart")
run

# %% [markdown]
# The run directory holds everything: `report.html`, checkpoints, TensorBoard files. Its tables and figures are at hand.

# %%
run.metrics[["epoch", "train/loss", "val/loss", "val/acc", "images_per_second"]]

# %%
run.figures["learning_curves"]

# %% [markdown]
# ## Look at conv1
# The kernels of the first layer, as in figure 3 of the paper, and the network itself: an ordinary PyTorch module.

# %%
run.figures["conv1_kernels"]

# %%
run.net

# %% [markdown]
# Classify a test image: `preprocess` takes PIL images, `probabilities` returns the softmax.

# %%
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
image = Image.fromarray((digits.images[-1] * 255 / 16).astype(np.uint8))
probabilities = run.trained.probabilities(run.trained.preprocess(image))[0]
print(f"label {digits.target[-1]}, predicted {run.trained.class_names[int(probabilities.argmax())]}")

# %% [markdown]
# ## Run a small study
# One number from one seed is an anecdote. `alexnet_pl.study` sweeps over every list: here two networks, three seeds
# each. Running the cell again skips what has finished.

# %%
study = alexnet_pl.study(
    "notebook",
    model=["lenet5", "cnn4"],
    seed=[1, 2, 3],
    trainer={"max_epochs": 2},
    callbacks={"dashboard": {"figures": False}},
)

# %% [markdown]
# ## Read the interval
# The report compares the networks pair by pair of equal seeds. An effect whose 95% interval contains zero has not been
# shown, whatever its mean; more seeds narrow the interval.

# %%
study

# %%
study.figures["results"]

# %%
accuracies = study.results.groupby("model")["test/acc"].agg(["mean", "std", "count"])
accuracies
