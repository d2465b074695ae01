"""Top-1 accuracy on labelled images beside multiply-adds and speed, of a model and its reduced variants.

    python tools/get_data.py fashion_mnist
    python tools/evaluate.py vit_nano_patch4_28 --pretrained --data fashion_mnist --method evit --set keep_rate=0.7
    python tools/evaluate.py deit_small_patch16_224 --checkpoint deit.pth --data imagenet --root imagenet --split val

Of a model trained from a config: its name and keywords, its checkpoint, and the pretrained model that it is compared
with and whose images it takes.

    python tools/evaluate.py stvit_deit_tiny_patch16_224 --model-kwargs img_size=28 patch_size=4 in_chans=1 \
      num_classes=10 --checkpoint work_dirs/stvit/epoch_3.pth --weights "3 epochs" --baseline vit_nano_patch4_28 \
      --data fashion_mnist

DyMU is calibrated on training images of the same set. Without --pretrained and --checkpoint weights are random. With
--json further records are added to the same file; tools/make_accuracy_page.py makes the table and the plot of
docs/accuracy.md of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from data.datasets import PICTURES, load_pictures
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import effvit
from effvit.data.preparation import data_config, image_transform
from effvit.measure.accuracy import shown_models, top1, with_accuracies
from effvit.measure.costs import profile
from effvit.measure.records import add_record, as_object, read_records
from effvit.measure.values import Record
from effvit.measure.variants import build, list_variants, parse_setting, reduced
from effvit.messages import run_command
from effvit.reducers import METHODS
from effvit.show.tables import mean_and_range

__all__ = ["main", "table"]

CALIBRATION_IMAGES = 512
COST_IMAGES = 16  # multiply-adds of methods that adapt to the image are a mean over these


class Prepared(Dataset[tuple[Tensor, int]]):
    """(image, label) pairs as a model takes them."""

    def __init__(self, pictures: Any, model: nn.Module) -> None:
        self.pictures = pictures
        self.transform = image_transform(model)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.pictures[index]
        return self.transform(image), label


def table(records: Sequence[Record]) -> list[str]:
    """Lines of a Markdown table of records; speed-ups refer to the first model of the same record."""
    lines = ["| model | top-1 (%) | MMACs | MAC ratio | speed-up | tokens left |", "|---|---|---|---|---|---|"]
    for cost, _, accuracies in shown_models(records):
        low, high = cost.interval
        cells = [
            cost.name,
            mean_and_range(accuracies),
            f"{cost.macs / 1e6:.1f}",
            f"{cost.mac_ratio:.2f}",
            f"{cost.speedup:.2f} ({low:.2f} to {high:.2f})",
            f"{cost.tokens[-1]:.1f}" if cost.tokens else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="any name of timm or of the zoo")
    parser.add_argument("--data", required=True, choices=PICTURES)
    parser.add_argument("--root", help="folder of the set (default for fetched sets: where get_data.py puts them)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="only so many images, evenly spread")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE")
    parser.add_argument("--key", metavar="NAME", help="entry of the checkpoint with the weights, where it has several")
    parser.add_argument("--weights", metavar="TEXT", help="how the checkpoint was trained, to follow the models' names")
    parser.add_argument("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="of timm.create_model")
    parser.add_argument("--baseline", metavar="NAME", help="pretrained model to compare with in place of MODEL")
    parser.add_argument("--method", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10, help="of the measurement of speed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the record to the list there")
    arguments = parser.parse_args(argv)
    return run_command("evaluate", lambda: report(arguments))


def report(arguments: argparse.Namespace) -> None:
    """Print the table of all variants and write their record."""
    if arguments.json is not None and arguments.json.exists():
        read_records(arguments.json)  # refused before the measurement, not after it
    record = evaluate(arguments)
    print("\n".join(table([record])))
    if arguments.json is not None:
        add_record(arguments.json, as_object(record))


def evaluate(arguments: argparse.Namespace) -> Record:
    """The record of all variants, with their accuracies."""
    torch.manual_seed(0)
    options = dict(parse_setting(text, "--model-kwargs") for text in arguments.model_kwargs)
    dense = build(arguments.model, options, arguments.pretrained).eval()
    if arguments.checkpoint is not None:
        effvit.load_checkpoint(dense, arguments.checkpoint, runner_types(), arguments.key)
    variants = list_variants(arguments.method, [parse_setting(text) for text in arguments.settings])
    trained = "" if arguments.weights is None else f", {arguments.weights}"
    models = {name + trained: m for name, m in {arguments.model: dense, **reduced(dense, variants)}.items()}
    taker = dense  # its data configuration is that of the images
    if arguments.baseline is not None:
        taker = build(arguments.baseline, {}, pretrained=True).eval()
        models = {arguments.baseline: taker, **models}
    pictures: Any = load_pictures(arguments.data, arguments.split, arguments.root)
    if arguments.limit is not None:
        pictures = spread(pictures, arguments.limit)
    train: Any = None
    for model in models.values():
        method = getattr(model, "method", None)
        if method is not None and METHODS[method].learns:
            train = train or spread(load_pictures(arguments.data, "train", arguments.root), CALIBRATION_IMAGES)
            effvit.calibrate(model, [images for images, _ in DataLoader(Prepared(train, taker), 128)])
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    for model in models.values():
        model.to(arguments.device).eval()
    loader = DataLoader(Prepared(pictures, taker), arguments.batch_size)
    accuracies = top1(models, track(loader, console=Console(stderr=True), transient=True), arguments.device)
    for model in models.values():
        model.cpu()
    images = next(iter(loader))[0][:COST_IMAGES]
    record = profile(
        models,
        data_config(taker)["input_size"],
        arguments.batch_size,
        images=images,
        image_names=[f"{len(images)} pictures of {arguments.data}"],
        rounds=arguments.rounds,
        threads=arguments.threads,
        device=arguments.device,
    )
    data = f"{arguments.data} {arguments.split}, {len(pictures)} pictures"
    return with_accuracies(record.with_weights(arguments.weights), accuracies, data)


def runner_types() -> list[Any]:
    """What the checkpoints of mmengine's Runner hold besides weights; nothing without mmengine."""
    if find_spec("mmengine") is None:
        return []
    from mmengine.runner.checkpoint import get_torch_safe_globals

    return list(get_torch_safe_globals())


def spread(pictures: Any, number: int) -> Any:
    """``number`` of the images, evenly spread over the set."""
    if not 0 < number <= len(pictures):
        raise ValueError(f"the set has {len(pictures)} pictures, cannot take {number} of them")
    return Subset(pictures, [index * len(pictures) // number for index in range(number)])


if __name__ == "__main__":
    sys.exit(main())
