"""What selected tokens still tell, without a language model: probes trained on all tokens of a frozen tower, read on K.

Two probes are trained on all patch tokens of training images: a linear one on their mean, and one that pools them by
attention. Both then read the K tokens that a selector leaves of each test image. A cell is a method and a number of
tokens, with the top-1 of both probes for each seed, which draws their weights and order, and the cells of the control
"random". Where a method cannot give a number of tokens, the cell says why. Methods for crops and videos are left out.

    python tools/measure_probes.py fashion_mnist --pretrained --json probes.json
    python tools/measure_probes.py cutouts --checkpoint vit_nano_patch8_96.safetensors --json probes.json
    python tools/measure_probes.py cutouts --mobile-sam --json probes.json  # windowed: methods of features alone

The same command goes on after a kill from the last complete cell.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from data.choice_sets import fashion_mnist
from data.cutouts import SPLITS
from data.labelled_scenes import LabelledScenes
from data.scenes import Cutouts
from data.sources import default_root
from evaluate_masks import mobile_sam_encoder
from kept_cells import KeptCells
from torch import Tensor, nn

from effvit.cli.models import create, has_random_weights
from effvit.cli.options import WeightArguments, entry, weights
from effvit.data.labelled import LabelledImages
from effvit.data.preparation import load_images
from effvit.hosts.tower_exit import KEYS, ROWS, Tower, TowerOutput, leaving_block, tower_host
from effvit.measure.evaluation import Selection
from effvit.measure.profiler import machine
from effvit.measure.resume import fingerprint
from effvit.messages import plain, run_command
from effvit.protocols import Json, Size
from effvit.schedule import block_number, check_count
from effvit.selectors import SELECTORS, Features, Selector
from effvit.selectors.select import choose_tokens

__all__ = ["Probes", "Stored", "Trainer", "main", "measure", "remarks", "store", "table"]

KIND = "top-1 of probes on selected tokens, 1"
DIVISORS = (2, 4, 8, 16)
CONTROLS = ("random", "uniform")
PROBES = ("linear", "attention")
SETS = ("fashion_mnist", "cutouts")
Read = tuple[int, str]  # a block, and the name of what is read of its attention


class Stored(NamedTuple):
    """Images as a tower sees them.

    Attributes:
        x: (M, N, C) patch tokens.
        grid: (H, W).
        labels: (M,) numbers of classes.
        read: What was read of the tower's attention, (M, N) or (M, N, D).
    """

    x: Tensor
    grid: Size
    labels: Tensor
    read: dict[Read, Tensor]


class Output(NamedTuple):
    """What a tower gives for a batch.

    Attributes:
        x: (B, N, C) patch tokens.
        grid: (H, W).
        notes: What was read.
    """

    x: Tensor
    grid: Size
    notes: tuple[Tensor, ...] = ()


class Source(NamedTuple):
    """A frozen tower.

    Attributes:
        model: Whose preparation images get.
        depth: Blocks, 0 where no attention can be read.
        reading: What to read -> a function of images.
    """

    model: nn.Module
    depth: int
    reading: Callable[[Sequence[Read]], Callable[[Tensor], Output]]


def plain_source(model: nn.Module, block: int) -> Source:
    """A plain ViT, whose tokens leave at a block."""
    host = tower_host(model)
    number = leaving_block(host, block)

    def reading(reads: Sequence[Read]) -> Callable[[Tensor], Output]:
        tower = Tower(tower_host(model), number, [(place, (ROWS | KEYS)[name]) for place, name in reads])

        def run(images: Tensor) -> Output:
            output: TowerOutput = tower(images)
            return Output(output.patches, output.tokens.grid, output.notes)

        return run

    return Source(model, len(host.blocks), reading)


def windowed_source(model: nn.Module) -> Source:
    """A network that gives maps (B, C, H, W) and no attention over the whole image."""

    def run(images: Tensor) -> Output:
        maps: Tensor = model.forward_features(images)  # type: ignore[operator]
        return Output(maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3]))

    return Source(model, 0, lambda reads: run)


@torch.inference_mode()
def store(source: Source, images: Selection, reads: Sequence[Read], batch_size: int) -> Stored:
    """Features of images, made once and held in memory."""
    run, outputs = source.reading(reads), []
    for start in range(0, len(images.indices), batch_size):
        read = [images.images.read(index) for index in images.indices[start : start + batch_size]]
        outputs.append(run(load_images(source.model, read)))
    labels = torch.tensor([images.images.labels[index] for index in images.indices])
    notes = [torch.cat(parts) for parts in zip(*(output.notes for output in outputs), strict=True)]
    x = torch.cat([output.x for output in outputs])
    return Stored(x, outputs[0].grid, labels, dict(zip(reads, notes, strict=True)))


class Probes(nn.Module):
    """A linear probe on the mean of the tokens, and one that pools them by attention, on standardised channels.

    Args:
        mean: (C,) of the training tokens.
        std: (C,) likewise.
        num_classes: Classes.
        heads: Of the attention, each with a query of its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, num_classes: int, heads: int = 4) -> None:
        super().__init__()
        channels = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std.clamp(min=1e-6))
        self.linear = nn.Linear(channels, num_classes)
        self.query = nn.Linear(channels, heads)
        self.attention = nn.Linear(heads * channels, num_classes)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores (B, classes) of the linear and of the attention probe.

        Args:
            x: (B, K, C) any number of tokens.
            valid: (B, K) False for padding; None: none.
        """
        x = (x - self.mean) / self.std
        there = x.new_ones(x.shape[:2]) if valid is None else valid.to(x.dtype)  # (B, K)
        mean = (x * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True)  # (B, C)
        logits = self.query(x).masked_fill(there.unsqueeze(-1) == 0, -math.inf)  # (B, K, heads)
        pooled = logits.softmax(dim=1).transpose(1, 2) @ x  # (B, heads, C)
        return self.linear(mean), self.attention(pooled.flatten(1))


class Trainer(NamedTuple):
    """How probes are trained: AdamW with a cosine schedule.

    Attributes:
        epochs: Over the training images.
        batch_size: Images.
        rate: Learning rate at first.
        decay: Weight decay.
    """

    epochs: int = 20
    batch_size: int = 256
    rate: float = 2e-3
    decay: float = 1e-4

    def train(self, training: Stored, seed: int) -> Probes:
        """Both probes on all tokens of the training images; each has parameters of its own, so one pass serves both."""
        torch.manual_seed(seed)
        probes = Probes(training.x.mean((0, 1)), training.x.std((0, 1)), int(training.labels.max()) + 1)
        optimizer = torch.optim.AdamW(probes.parameters(), self.rate, weight_decay=self.decay)
        steps = self.epochs * math.ceil(len(training.x) / self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(training.x)).split(self.batch_size):
                labels = training.labels[batch]
                loss = torch.stack([F.cross_entropy(scores, labels) for scores in probes(training.x[batch])]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return probes.eval()


def reads_of(selector: Selector | type[Selector], block: int, depth: int) -> list[Read]:
    """What a method reads, scores and then keys."""
    place = block_number(-1 if selector.reads_last else block, depth)
    return [(place, name) for name in (selector.row, selector.keys) if name is not None]


def methods_of(depth: int) -> list[str]:
    """Selectors of single images without weights; of a network without attention those of features alone."""
    chosen = {name: kind for name, kind in SELECTORS.items() if kind.takes == "select_tokens" and not kind.learns}
    return [name for name, kind in chosen.items() if depth or kind.row is None]


class Reader(NamedTuple):
    """Test images and the probes that read them.

    Attributes:
        test: Test images.
        probes: Of each seed.
        seeds: The seeds.
        block: Whose tokens were stored.
        depth: Blocks of the tower.
        batch_size: Images at once.
    """

    test: Stored
    probes: Sequence[Probes]
    seeds: Sequence[int]
    block: int
    depth: int
    batch_size: int

    def cell(self, method: str, divisor: int | None) -> dict[str, Json]:
        """Top-1 of all seeds on N / divisor tokens, or on as many as the method finds; or why there are none."""
        kind: Any = SELECTORS[method]
        kept = None if divisor is None else math.prod(self.test.grid) // divisor
        cell: dict[str, Json] = {"method": method, "divisor": divisor}
        try:
            # Only the control at random chooses by a seed; what the others leave is chosen once for all probes.
            selectors = [kind(seed=seed) for seed in self.seeds] if method == "random" else [kind()]
            found = [self.correct(selector, kept) for selector in selectors]
        except ValueError as error:
            return cell | {"refused": str(error)}
        tokens = sum(count for _, count in found) / len(found)
        shares = [found[place % len(found)][0][place] for place in range(len(self.seeds))]
        return cell | {"tokens": tokens, **{name: [own[i] for own in shares] for i, name in enumerate(PROBES)}}

    @torch.inference_mode()
    def correct(self, selector: Selector, kept: int | None) -> tuple[list[tuple[float, float]], float]:
        """Percentages that each seed's probes get right of what the selector leaves, and how many tokens that is."""
        test = self.test
        reads = reads_of(selector, self.block, self.depth) if self.depth else []
        right = torch.zeros(len(self.probes), len(PROBES), dtype=torch.int64)
        total = 0
        for batch in torch.arange(len(test.x)).split(self.batch_size):
            values = iter([test.read[read][batch] for read in reads])
            scores = None if selector.row is None else next(values)
            keys = None if selector.keys is None else next(values)
            chosen = choose_tokens(selector, Features(test.x[batch], test.grid, scores, keys), kept)
            total += int(chosen.counts.sum())
            for number, probes in enumerate(self.probes):
                for place, logits in enumerate(probes(chosen.tokens, chosen.valid)):
                    right[number, place] += (logits.argmax(1) == test.labels[batch]).sum()
        percent = (100 * right.double() / len(test.x)).tolist()
        return [(linear, attention) for linear, attention in percent], total / len(test.x)

    def dense(self) -> dict[str, Json]:
        """Top-1 on all tokens."""
        return self.cell("uniform", 1) | {"method": "all tokens"}


def measure(reader: Reader, kept: KeptCells, on_cell: Callable[[Mapping[str, Json]], None]) -> None:
    """Measure the cells that are missing."""
    wanted: list[tuple[str, int | None]] = [("all tokens", 1)]
    for method in methods_of(reader.depth):
        adapts_alone = SELECTORS[method].choose is Selector.choose
        wanted += [(method, None)] if adapts_alone else [(method, divisor) for divisor in DIVISORS]
    for method, divisor in wanted:
        if not kept.has(method=method, divisor=divisor):
            cell = reader.dense() if method == "all tokens" else reader.cell(method, divisor)
            kept.keep(cell)
            on_cell(cell)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(record: Mapping[str, Any], probe: str) -> list[str]:
    """Lines of a Markdown table of one probe: top-1 in percent, the mean over the seeds, a column for each number."""
    columns = {1: "all", **{divisor: f"N / {divisor}" for divisor in DIVISORS}, None: "its own"}
    texts: dict[str, dict[int | None, str]] = {}
    for cell in record["cells"]:
        text = "n/a" if "refused" in cell else f"{mean(cell[probe]):.2f}"
        texts.setdefault(cell["method"], {})[cell["divisor"]] = text
    lines = [f"| {probe} probe | {' | '.join(columns.values())} |", "|---|" + "---:|" * len(columns)]
    return lines + [f"| {name} | {' | '.join(own.get(c, '') for c in columns)} |" for name, own in texts.items()]


def remarks(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each probe and number of tokens at which a control is above methods."""
    sentences = []
    for probe in PROBES:
        for divisor in DIVISORS:
            cells = [cell for cell in record["cells"] if cell["divisor"] == divisor and "refused" not in cell]
            top1 = {cell["method"]: mean(cell[probe]) for cell in cells}
            for control in CONTROLS:
                below = [name for name in top1 if name not in CONTROLS and top1[name] < top1.get(control, -math.inf)]
                if below:
                    sentences.append(f"{probe} probe, N / {divisor}: {control} is above {', '.join(below)}.")
    return sentences


class Arguments(WeightArguments):
    """Parsed arguments."""

    set: str
    mobile_sam: bool
    block: int | None
    train_images: int
    test_images: int
    seeds: list[int]
    epochs: int
    batch_size: int
    threads: int
    root: Path
    json: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[weights(), entry()]
    )
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--mobile-sam", action="store_true", help="the encoder of MobileSAM that get_data.py fetched")
    parser.add_argument("--block", type=int, metavar="N", help="whose tokens leave (default: -2)")
    parser.add_argument("--train-images", type=int, default=20000, help="for the probes (default: 20000)")
    parser.add_argument("--test-images", type=int, default=10000, help="to read (default: 10000)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--epochs", type=int, default=Trainer().epochs, help="of the probes")
    parser.add_argument("--batch-size", type=int, default=100, help="images in the tower and in a selector")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--root", type=Path, default=default_root(), help="what get_data.py fetched into")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="cells are kept there")
    arguments = parser.parse_args(argv, Arguments())
    return run_command("measure_probes", lambda: run(arguments))


def opened(arguments: Arguments) -> dict[str, LabelledImages]:
    """The images of each split.

    Raises:
        ValueError, FileNotFoundError: As ``fashion_mnist`` and ``Cutouts``.
    """
    if arguments.set == "fashion_mnist":
        found = fashion_mnist(arguments.root)
        return {"train": found.training, "test": found.test}
    lengths = {"train": arguments.train_images, "test": arguments.test_images}
    return {split: LabelledScenes(Cutouts(split, arguments.root, length=lengths[split])) for split in SPLITS}


def source_of(arguments: Arguments) -> Source:
    """The frozen tower that was asked for."""
    if arguments.mobile_sam:
        if arguments.block is not None or not has_random_weights(arguments):
            raise ValueError(
                "--mobile-sam brings its weights and gives its last map; leave the weights and --block out"
            )
        path = arguments.root / "mobile_sam" / "mobile_sam.pt"
        if not path.is_file():
            raise FileNotFoundError(f"there are no weights at {plain(path)}; tools/get_data.py mobile_sam fetches them")
        return windowed_source(mobile_sam_encoder(path, nn.Identity()))
    if has_random_weights(arguments):
        raise ValueError("probes mean something on trained weights: give --checkpoint, --pretrained or --mobile-sam")
    model = "vit_nano_patch4_28" if arguments.set == "fashion_mnist" else "vit_nano_patch8_96"
    return plain_source(create(model, arguments), block_of(arguments))


def block_of(arguments: Arguments) -> int:
    """Whose tokens leave a plain tower."""
    return -2 if arguments.block is None else arguments.block


def run(arguments: Arguments) -> None:
    """Store features, train the probes, measure, and print both tables."""
    torch.set_num_threads(check_count("--threads", arguments.threads, 1))
    source, images = source_of(arguments), opened(arguments)
    training = Selection.of(images["train"], check_count("--train-images", arguments.train_images, 1))
    test = Selection.of(images["test"], check_count("--test-images", arguments.test_images, 1))
    trainer = Trainer(check_count("--epochs", arguments.epochs, 1))
    conditions: dict[str, Json] = {
        "training images": training.text,
        "test images": test.text,
        "weights": fingerprint(source.model.state_dict().values()),
        "block": None if arguments.mobile_sam else block_of(arguments),
        "seeds": list(arguments.seeds),
        "probes": dict(trainer._asdict()),
        "torch": torch.__version__,
    }
    kept = KeptCells(arguments.json, KIND, conditions, machine("cpu"))
    batch_size = check_count("--batch-size", arguments.batch_size, 1)
    seen = store(source, training, [], batch_size)
    probes = [trainer.train(seen, seed) for seed in arguments.seeds]
    reads = sorted(
        {
            read
            for name in methods_of(source.depth)
            if source.depth
            for read in reads_of(SELECTORS[name], block_of(arguments), source.depth)
        }
    )
    reader = Reader(
        store(source, test, reads, batch_size), probes, arguments.seeds, block_of(arguments), source.depth, batch_size
    )
    measure(reader, kept, report)
    for probe in PROBES:
        print("\n".join(table(kept.record(), probe)))
    print("\n".join(remarks(kept.record())))


def report(cell: Mapping[str, Any]) -> None:
    """Print what a cell says."""
    name = cell["method"] if cell["divisor"] is None else f"{cell['method']}, N / {cell['divisor']}"
    said = cell.get("refused") or ", ".join(f"{probe} {mean(cell[probe]):.2f} %" for probe in PROBES)
    print(f"{name}: {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
