"""``effvit test``: a checkpoint on the test set of its config, or a classifier with the weights its config names."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

from effvit.cli import options
from effvit.measure.records import write_records
from effvit.measure.values import Metrics
from effvit.messages import run_with_traceback

__all__ = ["add_command"]


class Arguments(options.RunnerArguments):
    """Parsed arguments of ``effvit test``."""

    checkpoint: str | None
    out: Path | None
    show_dir: str | None


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "test",
        parents=[options.runner()],
        help="evaluate a config of mmdet, mmseg or mmpretrain",
        description="Evaluate a checkpoint on the test set of its config, or a classifier with the weights that its "
        "config names.",
    )
    command.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="one that the Runner saved; loaded strictly. Without one a classifier has its pretrained weights",
    )
    command.add_argument(
        "--out", type=options.output_file, metavar="FILE", help="write the metrics there as JSON, for effvit report too"
    )
    command.add_argument("--show-dir", metavar="DIR", help="draw the predictions there")
    command.set_defaults(run=run_test)


def run_test(arguments: Arguments) -> int:
    """Evaluate; what goes wrong once the evaluation has begun keeps its traceback."""
    from effvit.dense.runner import build_runner, prepare_config, read_options, without_pretrained  # needs the extra mm

    values = read_options(arguments.cfg_options)
    if arguments.checkpoint is not None:
        values.setdefault("load_from", arguments.checkpoint)
    if arguments.show_dir:
        values |= {"default_hooks.visualization.draw": True, "default_hooks.visualization.interval": 1}
        values |= {"visualizer.save_dir": arguments.show_dir}
    config = prepare_config(arguments.config, work_dir=arguments.work_dir, options=values, launcher=arguments.launcher)
    if config.get("load_from") is not None:
        config = without_pretrained(config)
    elif not config.model.get("pretrained"):
        raise ValueError(
            f"{arguments.config} names no weights for its whole model; give a checkpoint, or for a classifier "
            "--cfg-options model.pretrained=True"
        )
    if "teacher" in config.model:
        config.model.teacher = None  # it only trains
    runner = build_runner(config)

    def evaluate() -> None:
        from mmengine.dist import is_main_process

        metrics = runner.test()
        if arguments.out is not None and is_main_process():
            numbers = {name: float(value) for name, value in metrics.items()}  # mmseg's are numpy's
            finite = {name: value if isfinite(value) else None for name, value in numbers.items()}
            write_records(arguments.out, [Metrics(arguments.config, arguments.checkpoint, finite)])

    return run_with_traceback(evaluate)
