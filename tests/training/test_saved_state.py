"""Training state from a checkpoint is compared with what the run would have saved."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from alexnet_pl.runtime.errors import ConfigError
from alexnet_pl.training.checkpoint_io import refuse_misfits
from alexnet_pl.training.optimizers import Muon
from alexnet_pl.training.resume import changes_since, derive_outputs, remote_loggers
from alexnet_pl.training.saved_state import check_inside, check_optimizer, check_schedule
from alexnet_pl.training.trackers import write_identity

pytestmark = pytest.mark.security

MAKERS = {
    "adam": lambda named: torch.optim.Adam((value for _, value in named), fused=True),
    "amsgrad": lambda named: torch.optim.AdamW((value for _, value in named), amsgrad=True),
    "sgd": lambda named: torch.optim.SGD((value for _, value in named), lr=0.1, momentum=0.9),
    "plain": lambda named: torch.optim.SGD((value for _, value in named), lr=0.1),
    "adafactor": lambda named: torch.optim.Adafactor((value for _, value in named)),
    "rprop": lambda named: torch.optim.Rprop(value for _, value in named),
    "lbfgs": lambda named: torch.optim.LBFGS(value for _, value in named),
    "muon": lambda named: Muon(value for _, value in named),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))


def trained(maker: str) -> dict:
    """Return the state dict of an optimizer that has made two steps."""
    net = network()
    optimizer = MAKERS[maker](net.named_parameters())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = net(torch.ones(2, 3, 4, 4)).square().sum()
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(loss)
    return optimizer.state_dict()


def check(maker: str, state: dict) -> None:
    net = network()
    optimizer = MAKERS[maker](net.named_parameters())
    with refuse_misfits("latest.ckpt"):
        optimizer.load_state_dict(state)
        check_optimizer(optimizer, MAKERS[maker], net.named_parameters())


@pytest.mark.parametrize("maker", MAKERS)
def test_the_state_of_the_same_optimizer_is_accepted(maker):
    check(maker, trained(maker))


@pytest.mark.parametrize(("saved", "now"), [("adam", "sgd"), ("sgd", "adam"), ("adam", "lbfgs"), ("adam", "muon")])
def test_the_state_of_another_optimizer_is_refused(saved, now):
    with pytest.raises(ConfigError, match=r"^latest.ckpt does not fit its config: .*"):
        check(now, trained(saved))


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1),  # a fused step would read and write behind its end
        torch.zeros(1).expand(4, 3, 3, 3),
        torch.zeros(4, 3, 3, 3).to_sparse(),
        torch.zeros(4, 3, 3, 3, device="meta"),
        "text",
        None,
    ],
)
def test_a_state_of_another_size_is_refused_before_it_is_used(wrong):
    state = trained("adam")
    state["state"][0]["exp_avg"] = wrong
    with pytest.raises(ConfigError, match="^latest.ckpt does not fit its config: "):
        check("adam", state)


def test_a_hidden_state_that_a_changed_option_would_read_is_refused():
    state = trained("adam")
    state["state"][0]["max_exp_avg_sq"] = torch.zeros(1)
    with pytest.raises(ConfigError, match="that of another optimizer"):
        check("adam", state)
    state["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ConfigError, match="max_exp_avg_sq is corrupt|another optimizer"):
        check("adam", state)
    state = trained("adam")
    state["param_groups"][0]["betas"] = "xy"
    with pytest.raises(ConfigError, match="TypeError"):
        check("adam", state)


SCHEDULES = {
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "steps": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2]),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0),
    "cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10**15),
}


def schedule(name: str):
    return SCHEDULES[name](torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_accepts_its_own_state_only(name):
    saved = schedule(name)
    saved.optimizer.step()
    saved.step(*([0.5] if name == "plateau" else []))
    check_schedule(schedule(name), [saved.state_dict()])
    check_schedule(schedule(name), [])  # starts anew
    check_schedule(None, [saved.state_dict()])
    for other in set(SCHEDULES) - {name}:
        with pytest.raises(ConfigError, match="the state of the scheduler is not that of "):
            check_schedule(schedule(other), [saved.state_dict()])
    for junk in (7, None, [3], [{}], [{**saved.state_dict(), "last_epoch": "x"}]):
        with pytest.raises(ConfigError, match="the state of the scheduler is "):
            check_schedule(schedule(name), junk)


def test_the_state_inside_an_epoch_is_checked():
    metrics = {"loss_sum": torch.zeros(())}
    good = {"cpu_rng": torch.get_rng_state(), "cuda_rng": None, "metrics": {"loss_sum": torch.ones(())}}
    check_inside([good], metrics)
    for wrong in (5, [5], [{}], [{**good, "cpu_rng": torch.zeros(3)}], [{**good, "metrics": {}}],
                  [{**good, "metrics": {"loss_sum": torch.zeros(1).expand(10**10)}}]):  # fmt: skip
        with pytest.raises(ConfigError, match="the state inside an epoch is corrupt"):
            check_inside(wrong, metrics)


@pytest.mark.parametrize("key", ["entity", "tracking_uri", "host_name", "api_key"])
def test_a_saved_config_may_not_choose_the_account_or_address_that_a_run_is_logged_to(key, tmp_path):
    target = "lightning.pytorch.loggers.WandbLogger"
    saved = OmegaConf.create({"logger": {"own": {"_target_": target, key: "https://other.example"}}})
    with pytest.raises(
        ConfigError, match=rf"^logger\.own\.{key}=https://other.example is refused: .*\+logger.own.{key}"
    ):
        derive_outputs(saved, OmegaConf.create({"logger": {}}), tmp_path)
    mine = OmegaConf.create({"logger": {"own": {key: "mine"}}})
    derive_outputs(saved, mine, tmp_path)
    assert saved.logger.own[key] == "mine"


def test_what_a_run_directory_says_about_trackers_is_shown(tmp_path):
    saved = OmegaConf.create(
        {
            "logger": {
                "wandb": {"_target_": "alexnet_pl.training.WandbTracker", "project": "theirs\x1b[2J"},
                "csv": {"_target_": "alexnet_pl.training.MetricsCSV", "path": "metrics.csv"},
            }
        }
    )
    write_identity(tmp_path, "wandb", "abc123")
    (line,) = remote_loggers(saved, tmp_path)
    assert line.startswith("logger.wandb: WandbTracker project=theirs[2J, as run abc123  (from ")
    assert line.endswith("trackers.json)")
    assert remote_loggers(OmegaConf.create({"logger": None}), tmp_path) == []


def nested(depth: int) -> dict:
    node: dict = {"lr": 1.0}
    for _ in range(depth):
        node = {"a": node, "b": node}
    return node


@pytest.mark.parametrize("optimizer", [nested(30), {"betas": [torch.ones(2), 0.9]}, {"lr": b"x"}])
def test_a_checkpoints_config_is_compared_within_limits(optimizer):
    """Two references per level to one dict are a billion values in a kilobyte of pickle."""
    cfg = OmegaConf.create({"optimizer": {"lr": 0.1}, "scheduler": None})
    with pytest.raises(ConfigError, match="corrupt: expected plain values|has more than|nested more than"):
        changes_since({"hyper_parameters": {"optimizer": optimizer}}, cfg)
    assert changes_since({"hyper_parameters": {"optimizer": {"lr": 0.1}, "scheduler": None}}, cfg) == {}
