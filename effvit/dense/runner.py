"""Training and testing configs of mmdet, mmseg and mmpretrain with mmengine's Runner (``effvit train``, ``test``).

What mmengine's own scripts do, and besides: processes on machines without an accelerator, checkpoints that must fit the
model, data that are checked and repaired before training (``effvit.dense.data_checks``), and bases of mmseg under the
maintained fork's name.
"""

from __future__ import annotations

from effvit.requirements import optional

with optional("mmengine", "mm", "effvit.dense.runner"):
    import mmengine  # noqa: F401

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.model import BaseModule
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.runner.checkpoint import get_torch_safe_globals

from effvit.dense.backbone import DenseBackbone
from effvit.dense.channels import check_channels
from effvit.dense.data_checks import check_annotations, nested_dicts
from effvit.dense.openmmlab import StartsPretrained, load_config
from effvit.hosts.checkpoints import check_state, read_file

__all__ = [
    "LAUNCHERS",
    "build_runner",
    "check_annotations",
    "check_checkpoint",
    "nested_dicts",
    "prepare_config",
    "read_launcher",
    "read_options",
    "start_weights",
    "without_pretrained",
]

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def read_launcher(launcher: str | None) -> str:
    """The launcher asked for; without one, "pytorch" in processes that torchrun has started and "none" elsewhere.

    Raises:
        ValueError: An unknown launcher; "none" in one of several processes, which would each train a model of
            their own.
    """
    if launcher not in (None, *LAUNCHERS):
        raise ValueError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {launcher!r}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if launcher is None:
        return "pytorch" if "RANK" in os.environ and "WORLD_SIZE" in os.environ else "none"
    if launcher == "none" and processes > 1:
        raise ValueError(
            f"launcher 'none' in one of {processes} processes would train {processes} models apart; leave --launcher "
            "out, or use 'pytorch'"
        )
    return launcher


def read_options(texts: Sequence[str]) -> dict[str, object]:
    """Values for keys of a config in dotted form, from texts KEY=VALUE as mmengine's command lines have them.

    Raises:
        ValueError: A text without key or without "=".
    """
    for text in texts:
        if text.find("=") < 1:
            raise ValueError(f"a value in place of the config's is written KEY=VALUE, got {text!r}")
    read = argparse.Namespace(options={})
    DictAction([], "options")(argparse.ArgumentParser(), read, texts)
    options: dict[str, object] = read.options
    return options


def prepare_config(
    path: str | Path,
    *,
    work_dir: str | Path | None = None,
    options: Mapping[str, object] | None = None,
    launcher: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    resume: str | None = None,
) -> Config:
    """A config as the command line changes it, fit for this machine.

    Args:
        path: Config of mmdet, mmseg or mmpretrain, as ``load_config`` takes it.
        work_dir: Where logs and checkpoints go; None means that of the config, else work_dirs/<name of the config>.
        options: Keys in dotted form -> values that replace those of the config.
        launcher: One of ``LAUNCHERS``, or None (see ``read_launcher``).
        amp: Train with mmengine's ``AmpOptimWrapper`` and a dynamic loss scale.
        auto_scale_lr: Scale the learning rate to the batch size by the config's ``auto_scale_lr``.
        resume: A checkpoint to go on from, "auto" for the latest in the work directory, or None. Where the work
            directory has none yet, "auto" starts as without: from the config's ``load_from``, if it names one.

    Raises:
        ValueError: Mixed precision without an accelerator, or ``auto_scale_lr`` for a config that names no base batch
            size; errors of ``read_launcher``.
    """
    config = load_config(path)
    if options:
        config.merge_from_dict(dict(options))
    config.launcher = read_launcher(launcher)
    if work_dir is not None or config.get("work_dir") is None:
        config.work_dir = str(work_dir or Path("work_dirs") / Path(path).stem)
    if config.get("visualizer"):
        # mmengine keeps one for each name, and mmdet's and mmseg's configs all say "visualizer": a second training of a
        # process would write its losses into the work directory of the first.
        config.visualizer.name = config.work_dir
    if amp:
        _use_mixed_precision(config)
    if auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise ValueError(f"auto_scale_lr needs auto_scale_lr=dict(base_batch_size=...), which {path} does not have")
        config.auto_scale_lr.enable = True
    if resume == "auto":
        resume = find_latest_checkpoint(config.work_dir)
    if resume is not None:
        config.resume, config.load_from = True, resume
    if config.launcher != "none" and get_device() == "cpu":
        _distribute_on_cpu(config)
    return config


def _use_mixed_precision(config: Config) -> None:
    if get_device() == "cpu":
        raise ValueError(
            "mixed precision needs an accelerator, and this machine has none; leave amp out to train in float32, or "
            "set optim_wrapper.type=BFloat16OptimWrapper if all the model's operators know bfloat16 (RoIAlign does not)"
        )
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.optim_wrapper.loss_scale = "dynamic"


def _distribute_on_cpu(config: Config) -> None:
    """Let several processes without an accelerator train together, where mmengine asks for CUDA.

    Batch norm that is synchronised over GPUs becomes ordinary, with the statistics of each process.
    """
    config.merge_from_dict({"env_cfg.dist_cfg.backend": "gloo"})
    wrapper: dict[str, object] = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
    wrapper["find_unused_parameters"] = config.get("find_unused_parameters", False)
    config.model_wrapper_cfg = wrapper | config.get("model_wrapper_cfg", {})
    for part in nested_dicts(config.model):
        if part.get("type") == "SyncBN":
            part["type"] = "BN"


def without_pretrained(config: Config) -> Config:
    """The config, changed so that its model asks for no weights."""
    for part in nested_dicts(config.model):
        if part.get("pretrained"):
            part["pretrained"] = False
    return config


def build_runner(config: Config) -> Runner:
    """The Runner of a prepared config, after a check of its data, channels and first weights; it logs repairs.

    A model starts from the checkpoint alone if there is one: the network is not asked for weights that its config
    names. Without a checkpoint it has its pretrained weights already.

    Raises:
        ValueError, FileNotFoundError: As ``check_annotations``, ``check_channels`` and ``check_checkpoint``; pretrained
            weights that are not there or do not fit.
    """
    lines = check_annotations(config)
    if config.launcher == "pytorch" and get_device() == "cpu" and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    runner = RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)
    backbone = getattr(getattr(runner.model, "module", runner.model), "backbone", None)
    if isinstance(backbone, DenseBackbone):
        check_channels(config.model, backbone.channels)
    checkpoint = config.get("load_from")
    for line in lines:
        runner.logger.info(line)
    if checkpoint is None and config.get("resume"):  # the config's own, without a checkpoint: mmengine looks for one
        checkpoint = find_latest_checkpoint(config.work_dir)
    if checkpoint is not None:
        check_checkpoint(runner, checkpoint)
    start_weights(
        runner.model, trained=checkpoint is not None and (_is_local(checkpoint) or config.get("resume", False))
    )
    return runner


def start_weights(model: torch.nn.Module, *, trained: bool) -> None:
    """Load the pretrained weights that a config names, or see to it that nobody does.

    Args:
        model: Model of a Runner.
        trained: A checkpoint that holds every weight is about to be loaded, so that none needs to start from others.
            Teachers, which no checkpoint holds, are loaded all the same.
    """
    for part in model.modules():
        if trained and isinstance(part, BaseModule):
            part.is_init = True
        if isinstance(part, StartsPretrained):
            part.init_weights()


def _is_local(path: str | Path) -> bool:
    """Whether a checkpoint is a file; addresses (https:// and so on) are left to mmengine."""
    return "://" not in str(path)


def check_checkpoint(runner: Runner, path: str | Path) -> None:
    """Raise a ValueError unless a checkpoint of mmengine holds every weight of the runner's model in its shape.

    mmengine itself loads what fits and leaves the rest as it is, with a warning in the log.

    Args:
        runner: Runner with the model.
        path: The file; an address is not checked.
    """
    if not _is_local(path):
        return
    model: torch.nn.Module = getattr(runner.model, "module", runner.model)
    content = read_file(path, get_torch_safe_globals())
    check_state(content.get("state_dict", content), model, path)
