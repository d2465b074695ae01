"""What selection behind a vision tower costs, as a share of the time of the tower: a ViT-L on as many tokens.

A cell is a number of tokens and a batch size. In it the tower and all selectors run interleaved, each once a round in
random order; a share is the median over the rounds of the ratio within a round, with its bootstrap 95 % interval. The
time of a selector is that of choosing among features drawn at random, and of what it reads of a block's attention.
Where a method cannot give a number of tokens, the row says why. Methods for crops and videos are left out.

    python tools/benchmark_selectors.py --json selectors.json
    python tools/benchmark_selectors.py --json selectors.json --tokens 576 --batch-sizes 1 --rounds 20

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
from kept_cells import KeptCells
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from effvit.attention import AttnState
from effvit.hosts.tower_exit import KEYS, ROWS
from effvit.measure.profiler import interleaved, keep_freed_memory, machine, median_ratio
from effvit.messages import run_command
from effvit.protocols import Json, Size
from effvit.schedule import check_count
from effvit.selectors import SELECTORS, Features, Selector
from effvit.selectors.select import choose_tokens
from effvit.tokens import TokenMap

__all__ = ["main", "measure_cell", "table"]

KIND = "shares of selectors in the time of a tower, 1"
TOWER = "tower"
LIMIT = 0.03  # of the tower's time, which a selector should not exceed


class TowerShape(NamedTuple):
    """Sizes of the tower.

    Attributes:
        width: C.
        depth: Blocks.
        heads: Of attention.
    """

    width: int = 1024
    depth: int = 24
    heads: int = 16


class Case(NamedTuple):
    """A selector and how many of the cells it keeps; None: as many as it finds.

    Attributes:
        selector: The method.
        kept: Tokens.
    """

    selector: Selector
    kept: int | None


def make_tower(shape: TowerShape, grid: Size) -> nn.Module:
    """A ViT with a class token on patches of 14 pixels, with random weights and without a head."""
    size = (14 * grid[0], 14 * grid[1])
    return VisionTransformer(size, 14, num_classes=0, embed_dim=shape.width, depth=shape.depth, num_heads=shape.heads)


def make_state(shape: TowerShape, grid: Size, batch_size: int, generator: torch.Generator) -> tuple[Tensor, AttnState]:
    """Patch tokens (B, N, C) drawn at random, and what attention of a block knows of them and a class token."""
    length = 1 + math.prod(grid)
    x = torch.randn(batch_size, length, shape.width, generator=generator)
    heads = (batch_size, shape.heads, length, shape.width // shape.heads)
    q, k, v = (torch.randn(heads, generator=generator) for _ in range(3))
    tokens = TokenMap.full(x, grid, num_prefix=1, num_class=1)
    return x[:, 1:], AttnState.of(q, k, v, heads[-1] ** -0.5, tokens)


def choosing(case: Case, x: Tensor, grid: Size, state: AttnState) -> Callable[[Tensor], object]:
    """What reads a block's attention and chooses."""
    selector = case.selector

    def run(_: Tensor) -> object:
        scores = None if selector.row is None else ROWS[selector.row](state)
        keys = None if selector.keys is None else KEYS[selector.keys](state)
        return choose_tokens(selector, Features(x, grid, scores, keys), case.kept)

    return run


def cases(grid: Size, channels: int, divisors: Sequence[int]) -> tuple[dict[str, Case], list[dict[str, Json]]]:
    """Selectors by the name of their row, and rows of those that cannot give such a number of tokens."""
    x = torch.zeros(1, math.prod(grid), channels)
    found, refused = {}, []
    for name, kind in SELECTORS.items():
        if kind.learns or kind.takes != "select_tokens":
            continue
        for divisor in divisors:
            selector, kept = kind(), math.prod(grid) // divisor
            adapts = kind.choose is Selector.choose
            try:
                selector.count(None if adapts else kept, grid)
                selector.check(kept, Features(x, grid))
            except ValueError as error:
                refused.append({"method": name, "divisor": divisor, "refused": str(error)})
                continue
            selector.settle(grid)
            found[name if adapts else f"{name}, N / {divisor}"] = Case(selector, None if adapts else kept)
    return found, refused


def measure_cell(
    shape: TowerShape, side: int, batch_size: int, divisors: Sequence[int], rounds: int
) -> dict[str, Json]:
    """The cell of a grid of ``side`` x ``side`` tokens: rows of all selectors.

    Args:
        shape: Of the tower.
        side: Cells of a side.
        batch_size: Images.
        divisors: Tokens over tokens that are kept.
        rounds: That count.
    """
    grid, generator = (side, side), torch.Generator().manual_seed(0)
    tower = make_tower(shape, grid).eval()
    x, state = make_state(shape, grid, batch_size, generator)
    images = torch.randn(batch_size, 3, 14 * side, 14 * side, generator=generator)
    found, refused = cases(grid, shape.width, divisors)
    runs = {TOWER: tower, **{name: choosing(case, x, grid, state) for name, case in found.items()}}
    seconds = interleaved(runs, images, rounds, warmup=1, precision=None, max_rounds=rounds, on_run=None)
    rows: list[Json] = []
    for name, case in found.items():
        share, interval = median_ratio(seconds[name], seconds[TOWER])
        kept = case.kept
        divisor = None if kept is None else side**2 // kept
        method = case.selector.name
        rows.append({"method": method, "divisor": divisor, "kept": kept, "share": share, "interval": list(interval)})
    return {"tokens": side**2, "batch_size": batch_size, "tower": seconds[TOWER], "rows": [*rows, *refused]}


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table: shares of the time in percent, those above the limit bold, by tokens x batch."""
    columns = [f"{cell['tokens']} x {cell['batch_size']}" for cell in record["cells"]]
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for column, cell in zip(columns, record["cells"], strict=True):
        for row in cell["rows"]:
            kept = "its own" if row["divisor"] is None else f"N / {row['divisor']}"
            text = "n/a" if "share" not in row else f"{100 * row['share']:.2f}"
            above = "share" in row and row["share"] > LIMIT
            texts.setdefault((row["method"], kept), {})[column] = f"**{text}**" if above else text
    lines = [f"| method | kept | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for (method, kept), own in texts.items():
        lines.append(f"| {method} | {kept} | {' | '.join(own.get(column, '') for column in columns)} |")
    return lines


class Arguments(argparse.Namespace):
    """Parsed arguments."""

    tokens: list[int]
    batch_sizes: list[int]
    divisors: list[int]
    rounds: int
    threads: int
    width: int
    depth: int
    heads: int
    json: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[576, 2304, 4096], metavar="N", help="squares")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], metavar="B")
    parser.add_argument("--divisors", nargs="+", type=int, default=[3, 9], metavar="D", help="N / D tokens are kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--width", type=int, default=TowerShape().width, help="channels of the tower")
    parser.add_argument("--depth", type=int, default=TowerShape().depth, help="blocks of the tower")
    parser.add_argument("--heads", type=int, default=TowerShape().heads, help="heads of the tower")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="cells are kept there")
    arguments = parser.parse_args(argv, Arguments())
    return run_command("benchmark_selectors", lambda: run(arguments))


def run(arguments: Arguments) -> None:
    """Measure the cells that are missing and print the table of all."""
    shape = TowerShape(*(check_count(f"--{name}", getattr(arguments, name), 1) for name in TowerShape._fields))
    rounds = check_count("--rounds", arguments.rounds, 1)
    sides = [math.isqrt(check_count("--tokens", number, 1)) for number in arguments.tokens]
    for number, side in zip(arguments.tokens, sides, strict=True):
        if side * side != number:
            raise ValueError(f"--tokens must be squares, the cells of a square image, got {number}; {side**2} is one")
    torch.set_num_threads(check_count("--threads", arguments.threads, 1))
    keep_freed_memory()
    conditions: dict[str, Json] = {**shape._asdict(), "rounds": rounds, "threads": arguments.threads}
    conditions |= {"divisors": list(arguments.divisors), "torch": torch.__version__}
    kept = KeptCells(arguments.json, KIND, conditions, machine("cpu"))
    for side in sides:
        for batch_size in arguments.batch_sizes:
            if not kept.has(tokens=side**2, batch_size=batch_size):
                kept.keep(measure_cell(shape, side, batch_size, arguments.divisors, rounds))
                print(f"{side**2} tokens, batch {batch_size}: done", flush=True)
    print("\n".join(table(kept.record())))


if __name__ == "__main__":
    sys.exit(main())
