"""Measure again, in a process of its own, what `effvit tune` found, beside the other schedules that reach its aim.

    effvit tune vit_nano_patch4_28 'fashion_mnist:*' --pretrained --speedup 1.5 --batch-size 60 --threads 1 \
      --json tuned.json
    python tools/check_tune.py tuned.json 'fashion_mnist:*' --pretrained --json docs/benchmarks/tune_cpu.json

Of each method and place of its reduction the setting with the least penalty is taken, on a ladder or block by block;
EViT without "reduce_at" reduces at the blocks of its paper. With --json the record is added to the file.

    effvit tune vit_nano_patch4_28 --data fashion/train-images-idx3-ubyte --limit 1000 --pretrained --speedup 1.5 \
      --batch-size 60 --threads 1 --json tuned.json
    python tools/check_tune.py tuned.json --data fashion/t10k-images-idx3-ubyte --pretrained --json held_out.json

With --data, or with --free and IMAGEs, the choice is held against what needs no search, on images that the search did
not see: every method it searched at its defaults, and patches dropped at random at the speed of the choice. Random
choices cost nothing, so that they are given more tokens than the choice has, in all its blocks by the same share: as
many as leave them no slower. Losses and top-1 of random choices are means over three draws.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from effvit.data.opening import open_labelled
from effvit.data.preparation import load_images
from effvit.measure.evaluation import Selection, load_labelled
from effvit.measure.fidelity import classified, compare_outputs, outputs
from effvit.measure.free_choices import CONTROL, SEEDS, FreeModel, default_models, random_controls
from effvit.measure.profiler import Measurement, machine, profile_models
from effvit.measure.records import add_record, as_json, as_object, read_tuning
from effvit.measure.resume import fingerprint
from effvit.measure.values import Candidate, Tuning
from effvit.measure.variants import build, reduce_by
from effvit.messages import one_line, plain, run_command
from effvit.protocols import Json, Settings
from effvit.show.named_images import find_images
from effvit.show.tables import DEFAULTS, settings_text

__all__ = ["contenders", "free_table", "main", "table", "weaker"]

SHARES = tuple(1 - 0.06 * step for step in range(9))  # of the patches the choice drops, dropped by random choices


def contenders(tuned: Tuning) -> list[Candidate]:
    """The best setting and, of every other method and place, the one of least penalty that reached the aim."""
    aim = tuned.target["speedup"] or 0
    nearest = {} if tuned.best is None else {_place(tuned.best): tuned.best}
    for candidate in sorted(tuned.tried, key=lambda c: c.penalty):
        if candidate.speedup >= aim:
            nearest.setdefault(_place(candidate), candidate)
    return list(nearest.values())


def _place(candidate: Candidate) -> tuple[str, bool]:
    """Its method, and whether that reduces elsewhere than by its default."""
    return candidate.method, "reduce_at" in candidate.settings


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table: what was found, then, measured again, all that reach the aim; the best in bold."""
    lines = [
        "| model | asked for | method | settings | divergence | speed-up measured again |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        for rank, row in enumerate(record["results"]):
            method = row["method"] if rank else f"**{row['method']}**"
            low, high = row["again"]["interval"]
            lines.append(
                f"| {record['host']} | {record['target']['speedup']:.2f} | {method} | "
                f"{settings_text(row['settings'])} | {row['fidelity']['divergence']:.3g} | "
                f"{row['again']['speedup']:.2f} ({low:.2f} to {high:.2f}) |"
            )
    return lines


def free_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table: the choice in bold, beside what needs no search; of random choices the mean."""
    lines = [
        "| model | asked for | method | settings | loss | top-1 (%) | divergence | speed-up measured again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for row in record["results"]:
            method = f"**{row['method']}**" if row["what"] == "choice" else row["method"]
            settings = settings_text(row["settings"]) or DEFAULTS
            if row["what"] == CONTROL:
                settings = f"{100 * row['share']:.0f} % of the drops of the choice, {len(row['draws'])} draws"
            loss, top1 = "–", "–"
            if all("classified" in draw for draw in row["draws"]):
                loss, top1 = (f"{_mean(row, 'classified', key):.{n}f}" for key, n in (("loss", 4), ("top1", 2)))
            low, high = row["again"]["interval"]
            speed = f"{row['again']['speedup']:.2f} ({low:.2f} to {high:.2f})"
            lines.append(
                f"| {record['host']} | {record['target']['speedup']:.2f} | {method} | {settings} | {loss} | {top1} | "
                f"{_mean(row, 'fidelity', 'divergence'):.3g} | {speed} |"
            )
    return lines


def _mean(row: Mapping[str, Any], group: str, key: str) -> float:
    """The mean over the draws of a row."""
    values = [draw[group][key] for draw in row["draws"]]
    return float(sum(values) / len(values))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned", type=Path, help="file that `effvit tune --speedup --json` wrote")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="as given to `effvit tune`; others with --free")
    parser.add_argument("--free", action="store_true", help="hold the choice against what needs no search")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="do so on labelled images that the search did not see"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only so many of them, evenly spread over the set")
    parser.add_argument("--pretrained", action="store_true", help="as given to `effvit tune`")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="add the record, with machine and versions, to this file")
    args = parser.parse_args(argv)
    return run_command("check_tune", lambda: check(args))


class Images(NamedTuple):
    """What is measured on: images (B, channels, H, W), their classes (B,) or None, and what the record calls them."""

    images: Tensor
    labels: Tensor | None
    name: Json


def check(args: argparse.Namespace) -> None:
    """Measure what a tuning found again, print its table and write the record."""
    tuned = read_tuning(args.tuned)
    if tuned.host is None or tuned.target.get("speedup") is None:
        raise ValueError(f"{plain(args.tuned)} is not the result of `effvit tune --speedup`")
    if tuned.best is None:
        raise ValueError(f"{plain(args.tuned)} names no best setting to measure again; give the file of another search")
    torch.manual_seed(0)  # as the command line does
    dense = build(tuned.host, {"img_size": list(tuned.conditions.input_size[1:])}, args.pretrained).eval()
    given = images_of(args, dense, tuned.host)
    if args.free or args.data is not None:
        check_unseen(given, tuned)
        kind, lines, results = "tune_free", free_table, beside_free(dense, tuned, tuned.best, given, args.rounds)
    else:
        kind, lines, results = "tune_check", table, found_again(dense, tuned, given, args.rounds)
    found = as_object(tuned)
    record: dict[str, Any] = {"kind": kind} | {key: found[key] for key in ("host", "target", "conditions")}
    record |= {"pretrained": args.pretrained, "images": given.name}
    record |= {"machine": machine(tuned.conditions.device), "results": results}
    print("\n".join(lines([record])))
    if args.json:
        add_record(args.json, record)


def images_of(args: argparse.Namespace, dense: nn.Module, host: str) -> Images:
    """The images of the command line as the model takes them.

    Raises:
        ValueError: Not one of IMAGEs and --data, --limit without --data, or as ``load_labelled``.
    """
    if (args.data is None) == (not args.images):
        raise ValueError("give one of IMAGEs and --data PATH to measure on")
    if args.data is None:
        if args.limit is not None:
            raise ValueError("--limit takes some images of a labelled set; name one with --data, or leave it out")
        return Images(load_images(dense, find_images(args.images)), None, args.images)
    selection = Selection.of(open_labelled(args.data), args.limit)
    return Images(*load_labelled(dense, selection, host), selection.text)


def check_unseen(given: Images, tuned: Tuning) -> None:
    """Raise a ValueError if these are the images that the search chose on."""
    if fingerprint([given.images]) == tuned.conditions.options.get("pixels"):
        raise ValueError(
            "a choice is held against others on images that the search did not see, but it chose on these; give others"
        )


def measured(
    dense: nn.Module, models: Sequence[nn.Module], tuned: Tuning, images: Tensor, rounds: int
) -> list[Measurement]:
    """Speeds of models beside the dense one, under the conditions of the search."""
    conditions = tuned.conditions
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=(len(models) + 1) * (rounds + 2))
        return profile_models(
            {"dense": dense, **{str(number): model for number, model in enumerate(models)}},
            conditions.input_size,
            conditions.batch_size,
            images=images,
            rounds=rounds,
            threads=conditions.threads,
            device=conditions.device,
            dtype=getattr(torch, conditions.dtype),
            on_run=lambda _: progress.advance(task),
        )[1:]


def again(speed: Measurement, rounds: int) -> dict[str, Json]:
    """A speed as records hold it."""
    return {"speedup": speed.speedup, "interval": list(speed.interval), "rounds": rounds}


def found_again(dense: nn.Module, tuned: Tuning, given: Images, rounds: int) -> list[dict[str, Json]]:
    """The contenders of a search with their speeds measured again."""
    rows = contenders(tuned)
    models = [cast("nn.Module", reduce_by(dense, row.method, row.settings)) for row in rows]
    speeds = measured(dense, models, tuned, given.images, rounds)
    return [{**as_object(row), "again": again(speed, rounds)} for row, speed in zip(rows, speeds, strict=True)]


def weaker(control: FreeModel, share: float, patches: int) -> Settings:
    """Settings of a random choice that drops so large a share of the patches that the given one drops by each block."""
    counts = cast("Sequence[int]", control.settings["num_tokens"])
    return {**control.settings, "num_tokens": [patches - round(share * (patches - count)) for count in counts]}


def beside_free(dense: nn.Module, tuned: Tuning, best: Candidate, given: Images, rounds: int) -> list[dict[str, Json]]:
    """The choice, the methods searched at their defaults, and random choices no slower than it, on the images."""
    chosen = reduce_by(dense, best.method, best.settings)
    methods = dict.fromkeys(candidate.method for candidate in tuned.tried)
    defaults = default_models(dense, [name for name in methods if (name, {}) != (best.method, best.settings)])
    random: list[Settings] = []
    try:
        control = random_controls(chosen, given.images, SEEDS[:1])[0]
        patches = cast("Any", dense).patch_embed.num_patches
        random = [weaker(control, share, patches) for share in SHARES]
    except ValueError as error:  # a method that restores tokens, or drops them where a control cannot
        print(f"no random control: {one_line(error)}", file=sys.stderr)
    timed = [FreeModel(best.method, best.settings, chosen), *defaults]
    timed += (FreeModel(CONTROL, own, reduce_by(dense, CONTROL, own)) for own in random)
    speeds = measured(dense, [own.model for own in timed], tuned, given.images, rounds)
    reference = outputs(dense, given.images)

    def draw(model: nn.Module) -> dict[str, Json]:
        own = outputs(model, given.images)
        found = {"fidelity": as_json(compare_outputs(reference, own))}
        return found if given.labels is None else found | {"classified": as_json(classified(own, given.labels))}

    whats = ["choice", *("default" for _ in defaults)]
    results: list[dict[str, Json]] = [
        {"what": what, "method": own.method, "settings": as_json(own.settings), "again": again(speed, rounds)}
        | {"draws": [draw(own.model)]}
        for what, own, speed in zip(whats, timed, speeds, strict=False)
    ]
    if random:
        number = as_fast([speed.speedup for speed in speeds[len(whats) :]], speeds[0].speedup)
        seeds = [{**random[number], "seed": seed} for seed in SEEDS]
        row = {"what": CONTROL, "method": CONTROL, "settings": as_json(random[number]), "share": SHARES[number]}
        row |= {"again": again(speeds[len(whats) + number], rounds)}
        results.append(row | {"draws": [draw(reduce_by(dense, CONTROL, own)) for own in seeds]})
    return results


def as_fast(speedups: Sequence[float], least: float) -> int:
    """The last of the speed-ups, those of ever fewer drops, before one is below ``least``; the first if that is."""
    return max(0, sum(1 for _ in takewhile(lambda speedup: speedup >= least, speedups)) - 1)


if __name__ == "__main__":
    sys.exit(main())
