"""Averaged weights: the validated, tested, resumed and exported ones are the same."""

import json

import pytest
import torch
from helpers import assert_same_run, config, run_until_stopped
from hydra.utils import instantiate
from lightning import Callback
from omegaconf import OmegaConf

from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.callbacks.averaging import EMA
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.run import run

RUN = (
    *("model=alexnet_bn", "model.channels=[4,6,8,8,6]", "model.fc_width=16", "data=digits", "data.batch_size=128"),
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=3", "optimizer.lr=0.003"),
    "callbacks.resume.min_interval_seconds=0",
)
LIGHTNING = "lightning.pytorch.callbacks"
CASES = {
    "ours": ("callbacks=ema", "callbacks.ema.decay=0.9"),
    "lightning's EMA": (f"+callbacks.mine._target_={LIGHTNING}.EMAWeightAveraging", "+callbacks.mine.decay=0.9"),
    "plain average": (f"+callbacks.mine._target_={LIGHTNING}.WeightAveraging",),
}


def validation_metrics(run_dir, net):
    """Return loss and accuracy of ``net`` on the validation images, computed without this project's loop."""
    data = instantiate(OmegaConf.load(run_dir / "config.yaml").data)
    data.setup()
    loss = right = count = 0
    for images, labels in data.val_dataloader():
        images, labels = data.on_after_batch_transfer((images, labels), 0)
        real = labels >= 0
        with torch.no_grad():
            logits = net(images[real])
        loss += float(torch.nn.functional.cross_entropy(logits, labels[real], reduction="sum"))
        right += int((logits.argmax(1) == labels[real]).sum())
        count += int(real.sum())
    return loss / count, right / count


@pytest.mark.parametrize("case", CASES)
def test_the_best_checkpoint_holds_the_validated_weights(case, tmp_path):
    """Issue: validation saw the averaged weights and best.ckpt got the raw ones."""
    run(config(*RUN, *CASES[case], run_dir=tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    loss, accuracy = validation_metrics(tmp_path / "run", load_run(tmp_path / "run").net)
    assert loss == pytest.approx(result["val/loss"], rel=1e-4)
    assert accuracy == pytest.approx(result["val/acc"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 10, 17, 30])
def test_a_run_with_averaged_weights_resumes_bit_for_bit(step, uninterrupted_run, tmp_path, monkeypatch):
    settings = (*RUN, "callbacks=ema", "callbacks.ema.decay=0.9")
    whole = uninterrupted_run(*settings)
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, step)
    run(config("resume=here", run_dir=tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "latest.ckpt") for folder in (tmp_path / "run", whole))
    for name, value in theirs["current_model_state"].items():
        assert torch.equal(ours["current_model_state"][name], value), name
    assert not torch.equal(theirs["current_model_state"]["net.classifier.fc6.weight"],
                           theirs["state_dict"]["net.classifier.fc6.weight"])  # fmt: skip


def test_the_final_weights_of_a_run_stopped_in_its_test_are_the_average(tmp_path, monkeypatch):
    """Issue: training had ended, so nothing replaced the raw weights, and ``*_final`` was measured with those."""
    settings = (*RUN, *CASES["ours"], "final_evaluation=true", "trainer.max_epochs=1", "trainer.limit_train_batches=4")
    run(config(*settings, run_dir=tmp_path / "whole"))
    run_until_stopped(config(*settings, run_dir=tmp_path / "run"), monkeypatch, 1, phase="test")
    run(config("resume=here", run_dir=tmp_path / "run"))
    found, expected = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "whole"))
    names = [name for name in expected if name.endswith("_final")]
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    assert names


@pytest.mark.parametrize("decay", [0.3, 0.9])  # reached after 3 of 30 updates, and not within them
def test_the_average_is_the_recursion_with_warm_up(decay, tmp_path):
    """Against the recursion in float64 on weights and BatchNorm's statistics after every step."""
    seen = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            state = pl_module.net.state_dict()
            seen.append({name: value.double().clone() for name, value in state.items() if value.is_floating_point()})

    import alexnet_pl.training.run as module

    real = module.build

    def build(*arguments):
        objects = real(*arguments)
        objects.callbacks["recorder"] = Recorder()
        return objects

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build", build)
        run(config(*RUN, "callbacks=ema", f"callbacks.ema.decay={decay}", run_dir=tmp_path / "run"))
    assert len(seen) == 30
    average = seen[0]
    for updates, current in enumerate(seen[1:], 1):
        weight = min(decay, (1 + updates) / (10 + updates))
        average = {name: weight * average[name] + (1 - weight) * value for name, value in current.items()}
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "latest.ckpt")["state_dict"]
    for name, value in average.items():
        torch.testing.assert_close(saved[f"net.{name}"].double(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("StochasticWeightAveraging", "swa_lrs:0.01", "Use callbacks=ema"),
        ("BatchSizeFinder", "", "Set data.batch_size"),
        ("LearningRateFinder", "", "Set optimizer.lr"),
        ("GradientAccumulationScheduler", "scheduling:{0:2}", "Set trainer.accumulate_grad_batches"),
    ],
)
def test_callbacks_with_which_a_result_would_be_wrong_are_refused(name, arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr("alexnet_pl.data.digits.DigitsDataModule.load", lambda self: pytest.fail("data was read"))
    described = f"{{_target_:{LIGHTNING}.{name}{',' * bool(arguments)}{arguments}}}"
    with pytest.raises(ConfigError, match=words):
        run(config(*RUN, f"+callbacks.mine={described}", run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_one_average_is_enough(tmp_path):
    with pytest.raises(ConfigError, match="callbacks.mine is invalid: expected one callback that averages"):
        run(config(*RUN, "callbacks=ema", *CASES["plain average"], run_dir=tmp_path / "run"))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ConfigError, match=f"callbacks.ema.decay={decay} is invalid: expected a number from 0"):
        EMA(decay)
