"""``effvit train``: a detector, segmenter or classifier from a config of mmdet, mmseg or mmpretrain."""

from __future__ import annotations

from effvit.cli import options
from effvit.messages import run_with_traceback

__all__ = ["add_command"]


class Arguments(options.RunnerArguments):
    """Parsed arguments of ``effvit train``."""

    amp: bool
    auto_scale_lr: bool
    resume: str | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "train",
        parents=[options.runner()],
        help="train a config of mmdet, mmseg or mmpretrain",
        description="Train a detector, segmenter or classifier from a config of mmdet, mmseg or mmpretrain. Processes "
        "that torchrun starts (torchrun --nproc-per-node 2 -m effvit.cli train ...) train together.",
    )
    command.add_argument("--amp", action="store_true", help="mixed precision (needs an accelerator)")
    command.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate to the batch size")
    command.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on from a checkpoint; without FILE from the latest in the work directory, if there is one",
    )
    command.set_defaults(run=run_train)


def run_train(arguments: Arguments) -> int:
    """Train; what goes wrong once training has begun keeps its traceback."""
    from effvit.dense.runner import build_runner, prepare_config, read_options  # needs the extra mm

    config = prepare_config(
        arguments.config,
        work_dir=arguments.work_dir,
        options=read_options(arguments.cfg_options),
        launcher=arguments.launcher,
        amp=arguments.amp,
        auto_scale_lr=arguments.auto_scale_lr,
        resume=arguments.resume,
    )
    if config.get("train_dataloader") is None:
        raise ValueError(f"{arguments.config} has no training data; it only evaluates, by effvit test")
    runner = build_runner(config)
    return run_with_traceback(runner.train)
