"""Sharing trained runs on the Hugging Face Hub: ``hf://USER/NAME`` as safetensors, config and model card.

What is pulled is as untrusted as any downloaded run directory: the weights are safetensors, which cannot hold code, the
config is JSON within limits, and ``load_run`` checks both as it checks a checkpoint. The server is ``HF_ENDPOINT``.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from alexnet_pl import __version__
from alexnet_pl.runtime.errors import UserError, one_line, printable

PREFIX = "hf://"

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

MAX_CONFIG_BYTES, MAX_WEIGHT_BYTES = 2**20, 8 * 2**30
"""Largest files that are downloaded. A config with 22,000 class names has half a megabyte."""

SHARED = ("model", "data", "augment", "loss", "optimizer", "scheduler", "seed", "split_seed", "class_names", "version")
"""Keys of a config that are shared. The others name directories of one machine, or how it was used."""

TRAINER = ("accelerator", "deterministic", "limit_test_batches", "limit_val_batches", "max_epochs", "precision")
"""Keys of the trainer section that are shared: what evaluating the network in the same way takes."""

PLACES = ("root", "shards", "cache")
"""Keys of the data section that name directories of one machine."""

TRIES, SECONDS = 2, 5.0
"""Attempts to reach the server, and how long each may take."""

HOW = "Expected hf://USER/NAME or hf://USER/NAME@REVISION."


def is_hub_address(run: str | Path) -> bool:
    """Return True for ``hf://USER/NAME``."""
    return str(run).startswith(PREFIX)


def parse_address(address: str) -> tuple[str, str | None]:
    """Return repository and revision of ``hf://USER/NAME[@REVISION]``.

    Raises:
        UserError: it is not such an address.
    """
    part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    found = re.fullmatch(rf"{PREFIX}({part}/{part})(?:@({part}))?", address, re.ASCII)
    if found is None:
        raise UserError(f"{printable(address)} is invalid. {HOW}")
    return found[1], found[2]


def push(address: str, net: nn.Module, config: Mapping[str, Any], about: Mapping[str, Any], card: str) -> str:
    """Upload a trained network and return the address of its page.

    Args:
        address: ``hf://USER/NAME``, created if it does not exist.
        net: the network on the CPU.
        config: the run's resolved config, of which the keys in :data:`SHARED` are uploaded.
        about: ``epoch`` and ``result``, what result.json holds.
        card: model card in Markdown.

    Raises:
        UserError: huggingface_hub is not installed, nobody is logged in, or the server refuses.
    """
    repository, revision = parse_address(address)
    hub = _import_hub()
    from safetensors.torch import save_file  # of the extra "hub"

    api = hub.HfApi(endpoint=_endpoint())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(shared_config(config, about), indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
        if reason := unreachable():
            raise UserError(f"{address} was not written: {reason}.")
        try:
            api.create_repo(repository, exist_ok=True)
            message = f"Trained with alexnet_pl {__version__}"
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, revision=revision)
        except Exception as error:  # the hub's, its HTTP client's and the operating system's own
            reason = one_line(error)[:300].rstrip(".")
            raise UserError(f"{address} was not written: {reason}. If you are not logged in: hf auth login") from error
    return f"{_endpoint() or 'https://huggingface.co'}/{repository}"


def shared_config(config: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json: what rebuilding the network takes, and no path of this machine."""
    shared = {key: config[key] for key in SHARED if key in config}
    trainer = config.get("trainer") or {}
    shared["trainer"] = {key: trainer[key] for key in TRAINER if key in trainer}
    shared["data"] = {key: value for key, value in config["data"].items() if key not in (*PLACES, "augment")}
    if "root" in config["data"]:
        shared["data"]["root"] = "data"
    result = dict(about["result"])
    if "data" in result:
        source = str(result["data"].get("source", "")).partition(" in ")[0]
        result["data"] = {**result["data"], "source": source}
    return {"format": "alexnet_pl", "config": shared, "epoch": about["epoch"], "result": result}


def pull(address: str) -> tuple[dict[str, Any], Path, dict[str, Any] | None]:
    """Download a network into the cache of huggingface_hub.

    Returns:
        The parts of a checkpoint (``hyper_parameters``, ``state_dict``, ``epoch``), all of them untrusted; the file of
        the weights; the contents of result.json.

    Raises:
        UserError: not found, no network, no access, or files that are too large or corrupt.
    """
    repository, revision = parse_address(address)
    _import_hub()
    reason = unreachable()
    described = _read_config(address, _download(repository, revision, CONFIG, MAX_CONFIG_BYTES, reason))
    weights = _download(repository, revision, WEIGHTS, MAX_WEIGHT_BYTES, reason)
    from safetensors import SafetensorError, safe_open  # of the extra "hub"

    try:
        with safe_open(weights, framework="pt") as file:
            tensors = {f"net.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{address}: {WEIGHTS} is corrupt: {one_line(error)[:200]}") from error
    checkpoint = {"hyper_parameters": described["config"], "state_dict": tensors, "epoch": described["epoch"] - 1}
    return checkpoint, weights, described.get("result")


def _read_config(address: str, path: Path) -> dict[str, Any]:
    """Return config.json with the keys that a checkpoint needs.

    Raises:
        UserError: it is corrupt, or belongs to another project.
    """
    try:
        described = json.loads(path.read_bytes())
        config, epoch, result = described["config"], described["epoch"], described.get("result")
        kinds = isinstance(config["model"], dict), isinstance(config["data"], dict), type(epoch) is int
        if not all(kinds) or not isinstance(result, dict | None) or described["format"] != "alexnet_pl":
            raise ValueError("unexpected contents")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{address} is not a network of alexnet_pl: {CONFIG}: {one_line(error)[:200]}.") from error
    return dict(described)


def unreachable() -> str:
    """Return why the server cannot be reached, or "". Without this check the hub's client retries for a minute."""
    from huggingface_hub import constants  # of the extra "hub"
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address, error = _endpoint() or constants.ENDPOINT, ""
    for _ in range(TRIES):
        try:
            get_session().head(address, timeout=SECONDS)
        except Exception as failure:  # of the hub's HTTP client, which differs between its versions
            error = one_line(failure)[:200].rstrip(".")
        else:
            return ""
    return f"{address} cannot be reached ({error})"


def _download(repository: str, revision: str | None, name: str, limit: int, offline: str) -> Path:
    """Return the local copy of a file, downloaded if the server's has changed.

    Args:
        offline: why only the cache can be used, or "".

    Raises:
        UserError: as for :func:`pull`.
    """
    hub = _import_hub()
    place = f"{PREFIX}{repository}"
    if offline:
        found = hub.try_to_load_from_cache(repository, name, revision=revision)
        if not isinstance(found, str):
            raise UserError(f"{place} cannot be loaded: {offline}, and {name} is not in the cache.")
        return Path(found)
    try:
        check_tag(_tag(hub, hub.hf_hub_url(repository, name, revision=revision, endpoint=_endpoint())))
        found = hub.hf_hub_download(repository, name, revision=revision, endpoint=_endpoint(), dry_run=True)
        if found.file_size > limit:
            raise UserError(f"{place}: {name} has {found.file_size:,} bytes, above the limit of {limit:,}.")
        return Path(hub.hf_hub_download(repository, name, revision=revision, endpoint=_endpoint()))
    except UserError:
        raise
    except Exception as error:  # the hub's, its HTTP client's and the operating system's own
        raise UserError(
            f"{place} cannot be loaded: {one_line(error)[:300]} {HOW} A private one needs: hf auth login"
        ) from error


def _tag(hub: Any, url: str) -> str | None:
    """Return the ETag of a file; None if the server cannot be asked: the file may be in the cache, or is not found."""
    try:
        tag: str | None = hub.get_hf_file_metadata(url, endpoint=_endpoint()).etag
    except Exception:  # the hub's and its HTTP client's own; the download that follows reports it
        return None
    return tag


def check_tag(tag: str | None) -> None:
    """Check the ETag of a file, which huggingface_hub makes the file's name in its cache without a check of its own.

    Raises:
        UserError: it is more than letters, digits, ``-`` and ``_``, so that the file could be written elsewhere.
    """
    if tag is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", tag, re.ASCII):
        raise UserError(f"the server's ETag {printable(tag)[:100]!r} is refused: expected letters and digits.")


def _endpoint() -> str | None:
    """Return the server's address; None for the default. huggingface_hub reads the variable at import only."""
    return os.environ.get("HF_ENDPOINT") or None


def _import_hub() -> Any:
    """Return huggingface_hub.

    Raises:
        UserError: it is not installed.
    """
    try:
        import huggingface_hub  # of the extra "hub"
        import safetensors  # noqa: F401, of the extra "hub"
    except ImportError as error:
        raise UserError(f"{PREFIX} needs the package {error.name}: pip install 'alexnet_pl[hub]'.") from error
    return huggingface_hub
