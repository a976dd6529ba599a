"""Forecast of a study's remaining time from what its trials compute and from the trials that have finished."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta

from omegaconf import DictConfig, OmegaConf

from alexnet_pl.config.hydra_versions import instantiate
from alexnet_pl.runtime.run_folder import CONFIG
from alexnet_pl.studies.store import Study

NOMINAL_IMAGES = 45_000
"""Training images per epoch if no limit applies: the data of a study are rarely of different sizes."""

NOMINAL_FLOPS, NOMINAL_BANDWIDTH = 5e11, 4e10
"""Operations and bytes per second. Only their ratio counts, between the network's arithmetic and Adam's traffic."""


def trial_costs(configs: Mapping[str, DictConfig]) -> dict[str, float]:
    """Return the relative cost of each trial's training by config hash; a network that cannot be built has none.

    Each different network is built once, on torch's meta device, and its operations are counted.
    """
    counted: dict[str, tuple[float, int] | None] = {}
    costs = {}
    for digits, cfg in configs.items():
        key = OmegaConf.to_yaml(cfg.model, resolve=True) + str(cfg.data.image_size)
        if key not in counted:
            counted[key] = _count(cfg)
        if (network := counted[key]) is not None:
            costs[digits] = _cost(cfg, *network)
    return costs


def _count(cfg: DictConfig) -> tuple[float, int] | None:
    """Return the operations of a forward pass per image and the number of parameters."""
    import torch  # here for start-up time: a study whose trials have all finished needs no torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            net = instantiate(cfg.model, image_size=cfg.data.image_size).eval()
            net(torch.empty(1, 3, cfg.data.image_size, cfg.data.image_size))
    except Exception:  # an invalid model is reported by its trial, in the trial's own words
        return None
    return float(counter.get_total_flops()), sum(parameter.numel() for parameter in net.parameters())


def _cost(cfg: DictConfig, operations: float, parameters: int) -> float:
    limit, batch_size, epochs = cfg.trainer.get("limit_train_batches", 1.0), cfg.data.batch_size, cfg.trainer.max_epochs
    batches = NOMINAL_IMAGES / batch_size
    batches = min(batches, limit) if isinstance(limit, int) else batches * (1.0 if limit is None else limit)
    per_step = 3 * operations * batch_size / NOMINAL_FLOPS + 28 * parameters / NOMINAL_BANDWIDTH
    return float(max(epochs or 1, 1) * batches * per_step)


def time_left(study: Study, trials: Sequence[str], states: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds until the command's last trial ends, or None before its first one has.

    A trial takes a fixed overhead and a time in proportion to its cost. The factor comes from the seconds of training
    that finished trials report. What remains of the time since the first trial began is overhead. The first trial of
    each worker, which also imports and warms up, counts only as long as there is no other.

    Args:
        states: by config hash, see :meth:`alexnet_pl.studies.store.Study.state`.
        now: seconds since 1970.
    """
    started, now = study.commands[-1]["started"] if study.commands else 0.0, time.time() if now is None else now
    costs = {digits: float(study.trials.get(digits, {}).get("cost", 1.0)) for digits in trials}
    done = [digits for digits in trials if states[digits] == "finished" and study.ended(digits) >= started]
    running = [digits for digits in trials if states[digits] == "running"]
    left = [digits for digits in trials if states[digits] in ("missing", "stopped")]
    if not done:
        return None
    begun = min(max(_mtime(study, digits, CONFIG), started) for digits in (*done, *running))
    workers = max(len(running) + bool(left), 1)  # beside the running trials one has just ended, and another follows
    done.sort(key=study.ended)
    if len(done) > workers:
        first, done = done[:workers], done[workers:]
        begun = sum(map(study.ended, first)) / workers  # so that every worker's time counts from its own first end
    trained = sum(study.result(digits).get("seconds", 0.0) for digits in done)
    factor = trained / sum(costs[digits] for digits in done)
    half = 0.5 * factor * sum(costs[digits] for digits in running)  # of a running trial, half is done on average
    overhead = max(workers * (now - begun) - trained - half, 0) / (len(done) + 0.5 * len(running))
    to_do = sum(overhead + factor * costs[digits] for digits in left) + half + 0.5 * overhead * len(running)
    return float(to_do / workers)


def _mtime(study: Study, digits: str, name: str) -> float:
    try:
        return os.stat(study.run_dir(digits) / name).st_mtime
    except OSError:
        return time.time()


def progress(study: Study, trials: Sequence[str]) -> str:
    """Return a line with the numbers of trials done, running, failed and left, the elapsed time and the time to go."""
    started = study.commands[-1]["started"] if study.commands else 0.0
    states = {digits: study.state(digits, since=started) for digits in trials}
    counts = Counter(states.values())
    left = counts["missing"] + counts["stopped"]
    line = f"study {study.root.name}: {counts['finished']} done, {counts['running']} running, "
    line += f"{counts['failed']} failed, {left} left"
    line += f"; {timedelta(seconds=round(max(time.time() - started, 0)))} elapsed"
    to_go = time_left(study, trials, states) if left or counts["running"] else None
    return line if to_go is None else f"{line}, about {timedelta(seconds=round(to_go))} to go"
