"""Programs that take away what Windows lacks, then import or train. Run by ``test_platforms.py`` in fresh processes."""

import os
import signal
import sys
import types
from importlib import import_module
from pkgutil import walk_packages

MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")

SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "SIGCHLD", "SIGSTOP", "SIGCONT", "SIGQUIT")

FUNCTIONS = (
    "fork", "forkpty", "register_at_fork", "getuid", "geteuid", "getgid", "setsid", "getpgid", "killpg", "statvfs",
    "chown", "mkfifo", "sched_getaffinity", "getloadavg", "nice", "uname", "posix_fallocate", "posix_fadvise",
    "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK",
)  # fmt: skip

FIRST = (
    "filelock", "hydra.main", "hydra.utils", "lightning", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "multiprocessing.resource_tracker", "pandas", "rich.console", "scipy.stats", "sklearn.datasets",
    "tensorboard.compat.proto.summary_pb2", "torch.utils.tensorboard", "torch.utils.data", "torchmetrics",
    "torchvision.transforms.v2", "torchvision.datasets",
)  # fmt: skip
"""Packages imported before: they guard their own POSIX names by the platform that they are built for."""

EXTRAS = ("gradio", "starlette", "onnx", "onnxscript", "simplejpeg", "s3fs", "huggingface_hub", "wandb", "mlflow")
"""Optional packages that a module of ours may lack."""


def hide_posix() -> dict[str, signal.Signals]:
    """Make this process look like Windows to modules of ours, none of which has been imported yet.

    Returns:
        The hidden signals.
    """
    for name in FIRST:
        import_module(name)
    assert not [name for name in sys.modules if name.startswith("alexnet_pl")]
    import fcntl

    def locking(descriptor: int, mode: int, length: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    msvcrt = types.ModuleType("msvcrt")
    vars(msvcrt).update(LK_NBLCK=2, locking=locking)
    sys.modules["msvcrt"] = msvcrt
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ImportError
    hidden = {name: getattr(signal, name) for name in SIGNALS}
    for name in SIGNALS:
        delattr(signal, name)
    for name in FUNCTIONS:
        if hasattr(os, name):
            delattr(os, name)
    sys.platform = "win32"
    return hidden


def import_everything() -> dict[str, signal.Signals]:
    """Import every module of the package, and check which signals stop a run. Return the hidden signals."""
    hidden = hide_posix()
    import alexnet_pl

    imported = 0
    for module in walk_packages(alexnet_pl.__path__, "alexnet_pl."):
        try:
            import_module(module.name)
            imported += 1
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
    assert imported > 100
    from alexnet_pl.runtime.signals import GracefulShutdown, stop_signals
    from alexnet_pl.runtime.system import usable_cores

    assert {number.name for number in stop_signals()} == {"SIGINT", "SIGTERM"}
    assert usable_cores() == os.cpu_count()
    shutdown = GracefulShutdown()
    shutdown.install()
    shutdown.restore()
    return hidden


def train() -> None:
    """Train, resume and evaluate in the current directory."""
    vars(signal).update(import_everything())  # Lightning has found its platform before, and needs them
    import alexnet_pl
    from alexnet_pl.inference.evaluation import evaluate

    overrides = [
        "model=lenet5", "data=digits", "trainer=smoke", "trainer.accelerator=cpu", "trainer.precision=32-true",
        "callbacks.resume.keep=true", "callbacks.dashboard.num_neighbor_images=0",
    ]  # fmt: skip
    run = alexnet_pl.train(overrides, run_dir="run")
    longer = alexnet_pl.train(resume="run", allow_changes=True, trainer={"max_epochs": 3})
    assert (run.result["epochs"], longer.result["epochs"]) == (2, 3)
    assert "learning_curves" in longer.figures
    assert evaluate(longer.trained) is not None


if __name__ == "__main__":
    {"import": import_everything, "train": train}[sys.argv[1]]()
