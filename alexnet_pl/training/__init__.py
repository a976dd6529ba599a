"""Training: one run from its config to result.json, and the callbacks, loggers and schedules that configs name."""

from alexnet_pl.training.build import Trainer
from alexnet_pl.training.callbacks.averaging import EMA
from alexnet_pl.training.callbacks.checkpoint import BestCheckpoint, ResumeCheckpoint
from alexnet_pl.training.callbacks.dashboard import Dashboard
from alexnet_pl.training.callbacks.monitoring import StopAtTrainingError, StopWithoutImprovement
from alexnet_pl.training.callbacks.nan_monitor import NaNMonitor
from alexnet_pl.training.loggers import MetricsCSV
from alexnet_pl.training.lr_schedules import Milestones, WarmupPlateau
from alexnet_pl.training.optimizers import Muon
from alexnet_pl.training.trackers import MLflowTracker, WandbTracker

__all__ = [
    "EMA",
    "BestCheckpoint",
    "Dashboard",
    "MLflowTracker",
    "MetricsCSV",
    "Milestones",
    "Muon",
    "NaNMonitor",
    "ResumeCheckpoint",
    "StopAtTrainingError",
    "StopWithoutImprovement",
    "Trainer",
    "WandbTracker",
    "WarmupPlateau",
]
