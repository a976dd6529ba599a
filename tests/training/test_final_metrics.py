"""Final evaluation: metrics of the final weights on all splits, without dropout and augmentation."""

import pytest
import torch
from helpers import config

from alexnet_pl.inference.trained_run import load_run
from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.runtime.run_folder import finished_result
from alexnet_pl.training.checkpoint_io import read_checkpoint
from alexnet_pl.training.classifier import ImageClassifier
from alexnet_pl.training.run import run

RUN = ("model=lenet5", "data=digits", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=2")


def test_the_final_weights_are_tested_on_plain_images(tmp_path):
    """Compared with the accuracy of the latest checkpoint's weights, computed by hand on the images of each split."""
    cfg = config(*RUN, "final_evaluation=true", "augment=crop_flip", "optimizer.lr=0.003", run_dir=tmp_path)
    run(cfg)
    result = finished_result(tmp_path)
    trained = load_run(tmp_path)
    state = read_checkpoint(tmp_path / "checkpoints" / "latest.ckpt")["state_dict"]
    trained.net.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    data = trained.data_class(**{k: v for k, v in trained.config["data"].items() if k not in ("_target_", "augment")})
    data.setup()
    for split in ("train", "val", "test"):
        loader = getattr(data, f"{split}_dataloader")()
        images, labels = loader.gather(loader.indices)
        with torch.inference_mode():
            logits = trained.net((images / 255 - 0.5) / 0.5)
        assert result[f"{split}/acc_final"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        assert result[f"{split}/loss_final"] == pytest.approx(loss, rel=1e-4)
    assert 0.3 < result["train/acc_final"] <= result["train/acc_top5_final"] <= 1


def test_without_the_key_nothing_more_is_measured(tmp_path):
    run(config(*RUN, "trainer=smoke", run_dir=tmp_path))
    assert not [name for name in finished_result(tmp_path) if name.endswith("_final")]
    with pytest.raises(ConfigError, match="final_evaluation=1 is invalid: expected true or false"):
        run(config(*RUN, "final_evaluation=1", run_dir=tmp_path / "x"))


def test_the_network_is_moved_to_where_the_images_are(tmp_path, monkeypatch):
    """Lightning leaves a trained network on the CPU, which ended every such run on a GPU with an error."""
    moves: list[object] = []
    to, cpu = ImageClassifier.to, ImageClassifier.cpu
    monkeypatch.setattr(ImageClassifier, "to", lambda self, device: moves.append(device) or to(self, device))
    monkeypatch.setattr(ImageClassifier, "cpu", lambda self: moves.append("teardown") or cpu(self))

    def evaluate(*arguments: object) -> dict[str, float]:
        moves.append("evaluation")
        return {"loss": 0.0, "acc": 0.0, "acc_top5": 0.0}

    monkeypatch.setattr("alexnet_pl.training.final_metrics._evaluate", evaluate)
    run(config(*RUN, "trainer=smoke", "final_evaluation=true", run_dir=tmp_path))
    first = moves.index("evaluation")
    assert moves[first - 2 : first] == ["teardown", torch.device("cpu")]
