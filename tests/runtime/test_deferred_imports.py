"""Deferred imports: what they answer, when they load, and that a run and the help texts do without the modules."""

import inspect
import json
import subprocess
import sys

import pytest
from helpers import PATIENCE, SHORT_RUN, train

from alexnet_pl.runtime import deferred_imports
from alexnet_pl.runtime.deferred_imports import DEFERRED, is_deferred, load

HEAVY = {"torch._inductor", "torch._dynamo.eval_frame", "sympy", "matplotlib", "scipy.stats", "sklearn", "pandas"}


# --- in order, in a process of their own: this one has loaded everything already ---


def _libraries_find_deferred_modules() -> None:
    import lightning  # noqa: F401
    import torchvision  # noqa: F401

    assert {name for name in DEFERRED if is_deferred(sys.modules.get(name))} == {*DEFERRED}


def _training_needs_no_compiler_and_compiling_works_afterwards() -> None:
    import torch
    from lightning.fabric.wrappers import OptimizedModule

    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step(forward) -> None:
        optimizer.zero_grad()
        forward(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    step(net)
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__
    assert zero_grad.__dynamo_disable is zero_grad
    assert is_deferred(sys.modules["torch._dynamo"])
    assert not isinstance(net, OptimizedModule)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(1, 2)), net(torch.ones(1, 2)))
    assert isinstance(compiled, OptimizedModule)
    assert not hasattr(zero_grad, "__dynamo_disable")
    step(compiled)
    assert zero_grad.__dynamo_disable is not zero_grad


def _metrics_can_be_plotted_and_filters_designed() -> None:
    import scipy.signal
    import torch
    from torchmetrics.classification import MulticlassAccuracy

    assert not {"matplotlib", "scipy.stats"} & {*sys.modules}
    metric = MulticlassAccuracy(3)
    metric(torch.tensor([0, 1]), torch.tensor([0, 2]))
    _, axes = metric.plot()
    assert axes.get_ylabel() == "MulticlassAccuracy"
    assert scipy.signal.hamming(3).tolist() == scipy.signal.windows.hamming(3).tolist()


def _every_answer_is_replaced_by_what_it_stands_for() -> None:
    for name, answers in DEFERRED.items():
        module = sys.modules[name]
        load(module)
        assert not is_deferred(module)
        left = {answer for answer in answers if vars(module)[answer] is answers[answer]}
        assert left == ({"hamming"} if name == "scipy.signal" else set()), f"an upgrade has removed {name}.{left}"


def _loading_a_submodule_loads_its_package_first_and_once() -> None:
    import torch

    assert is_deferred(sys.modules.get("torch._dynamo")) or "torch._dynamo" not in sys.modules
    import torch._dynamo as package
    import torch._dynamo.utils as utils

    assert is_deferred(package)
    import torch._dynamo.eval_frame as eval_frame
    from torch._dynamo import config

    assert not is_deferred(package)
    assert package is torch._dynamo is sys.modules["torch._dynamo"]
    assert utils is package.utils is sys.modules["torch._dynamo.utils"]
    assert eval_frame is package.eval_frame is sys.modules["torch._dynamo.eval_frame"]
    assert config is sys.modules["torch._dynamo.config"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize(
    "phases",
    [
        pytest.param(
            (
                _libraries_find_deferred_modules,
                _training_needs_no_compiler_and_compiling_works_afterwards,
                _metrics_can_be_plotted_and_filters_designed,
                _every_answer_is_replaced_by_what_it_stands_for,
            ),
            marks=pytest.mark.slow,
        ),
        (_loading_a_submodule_loads_its_package_first_and_once,),
    ],
    ids=["run", "submodule"],
)
def test_deferred_modules(phases):
    code = [
        "import sys, pytest",
        "from alexnet_pl.runtime.deferred_imports import DEFERRED, defer_imports, is_deferred, load",
        "defer_imports()",
        *(f"{inspect.getsource(phase)}\n{phase.__name__}()" for phase in phases),
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_process_that_has_loaded_torch_defers_nothing():
    before = [*sys.meta_path]
    deferred_imports.defer_imports()
    assert sys.meta_path == before


# --- commands ---------------------------------------------------------------------------------------------------------

PROBE = """
import json, os, sys
from pathlib import Path
from lightning import Callback

class Probe(Callback):
    def on_train_batch_end(self, *arguments):
        Path("modules.json").write_text(json.dumps([*sys.modules]))
        os._exit(0)
"""


def test_first_step_comes_before_heavy_modules_are_loaded(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    done = train(*SHORT_RUN, "+callbacks.probe._target_=probe.Probe", cwd=tmp_path, PYTHONPATH=".")
    assert (tmp_path / "modules.json").is_file(), done.stdout + done.stderr
    loaded = HEAVY & {*json.loads((tmp_path / "modules.json").read_text())}
    assert loaded == set()


def test_printing_the_config_loads_no_torch(tmp_path):
    code = (
        "import sys; from alexnet_pl.__main__ import main; main(); "
        "assert not {'torch', 'numpy', 'lightning'} & {*sys.modules}"
    )
    command = [sys.executable, "-c", code, "train", *SHORT_RUN, "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "_target_: alexnet_pl.models.LeNet5" in done.stdout
