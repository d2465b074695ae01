"""Multiply-adds counted here beside published ones and those of the official code, as the table of docs/flops.md.

docs/benchmarks/published_flops.json says what to count and where the other figures are from; the counts go to
counted_flops.json beside it. Every count on a trace is checked against the closed form; SAM at 1024
pixels is counted in closed form alone.

    python tools/compare_flops.py              # count everything, 12 minutes on one core
    python tools/compare_flops.py --only sit   # count these groups alone, keep the other counts
    python tools/compare_flops.py --table      # only write the table anew
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from marked_table import put_table
from rich.progress import track
from torch import nn

import effvit
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.flops import count_flops

__all__ = ["build", "closed_form", "deviation", "key", "main", "table", "with_table"]

DOCS = Path(__file__).resolve().parents[1] / "docs"
PUBLISHED, COUNTED = DOCS / "benchmarks/published_flops.json", DOCS / "benchmarks/counted_flops.json"
PAGE = DOCS / "flops.md"
GROUPS = {
    "dense": "Dense models",
    "evit": "EViT",
    "tome": "ToMe",
    "gtp": "GTP",
    "ats": "ATS",
    "zero_tprune": "Zero-TPrune",
    "expedite": "Expedite on SAM",
    "lookupvit": "LookupViT",
    "supertoken": "Super-token ViT",
    "stvit_deit": "STViT on DeiT",
    "stvit_r": "STViT-R on Swin",
    "sit": "SiT",
    "casvit": "CAS-ViT",
}


def key(setting: dict[str, Any]) -> str:
    """Name of a setting in the file of counts."""
    return f"{setting['model']}, {setting['setting']}"


def build(setting: dict[str, Any], device: str = "cpu") -> nn.Module:
    """The model of a setting, without weights on the device "meta"."""
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in setting["args"].items()}
    with torch.device(device):
        return timm.create_model(setting["model"], **args).eval()


def closed_form(setting: dict[str, Any]) -> int:
    """MACs of a setting in closed form."""
    counts = setting.get("token_counts")
    return sum(closed_form_macs(build(setting, "meta"), (3, *setting["size"]), token_counts=counts).values())


def count(setting: dict[str, Any]) -> int:
    """MACs of a setting on a trace; of large models, and where weights nobody has set the tokens, in closed form."""
    expected = closed_form(setting)
    if "token_counts" in setting or setting.get("in_closed_form", False):
        return expected
    macs = count_flops(build(setting), (3, *setting["size"]), strict=True).total
    assert macs == expected, f"{key(setting)}: {macs} on a trace, {expected} in closed form"
    return macs


def deviation(macs: int, figure: float | str | None) -> float | None:
    """Share that a count lies above a figure in G; 0 if it is within what a printed figure (a string) rounds away."""
    if figure is None:
        return None
    if isinstance(figure, str):
        half_unit = 0.5 * 10.0 ** -len(figure.partition(".")[2])
        if abs(macs / 1e9 - float(figure)) <= half_unit:
            return 0.0
    return macs / 1e9 / float(figure) - 1


class Notes:
    """Numbered notes below a table."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str | None) -> str:
        """The mark of a note in a cell; nothing for none."""
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"

    def lines(self) -> list[str]:
        """The notes in Markdown."""
        return ["", *(f"{i}. {text}" for i, text in enumerate(self.texts, start=1))]


def _figure(figure: float | str | None, macs: int | None = None) -> str:
    share = None if macs is None else deviation(macs, figure)
    return (
        f"{figure or ''}" if share is None else f"{figure} ({share:+.1%})".replace("+0.0%", "=").replace("-0.0%", "=")
    )


def table(published: dict[str, Any], counted: dict[str, int]) -> list[str]:
    """Lines of the tables of all groups in Markdown."""
    sources, remarks, lines = published["sources"], published["remarks"], []
    for group, title in GROUPS.items():
        lines += [f"### {title}", "", "| model | setting | counted | other count | published |"]
        lines.append("| --- | --- | ---: | ---: | ---: |")
        notes = Notes()
        for setting in (setting for setting in published["settings"] if setting["group"] == group):
            macs = counted[key(setting)]
            other = _figure(setting["reference"], macs) + notes.mark(sources.get(setting["reference_from"]))
            paper = _figure(setting.get("published"), macs) + notes.mark(setting.get("published_in"))
            count = f"{macs / 1e9:.4f}" + notes.mark(remarks.get(setting.get("remark")))
            lines.append(f"| {setting['model']} | {setting['setting']} | {count} | {other} | {paper} |")
        lines += [*notes.lines(), ""]
    lines += ["### Not counted here", "", "| model | setting | other count | published | why |"]
    lines.append("| --- | --- | ---: | ---: | --- |")
    notes = Notes()
    for entry in published["elsewhere"]:
        other = _figure(entry["reference"]) + notes.mark(sources.get(entry.get("reference_from")))
        paper = _figure(entry.get("published")) + notes.mark(entry.get("published_in"))
        lines.append(f"| {entry['model']} | {entry['setting']} | {other} | {paper} | {entry['reason']} |")
    return [*lines, *notes.lines()]


def with_table(text: str, lines: Sequence[str]) -> str:
    """docs/flops.md with those lines as its table."""
    return put_table(text, "docs/flops.md", "flops", "compare_flops.py", lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Count and write the table into the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to count")
    parser.add_argument("--table", action="store_true", help="count nothing")
    arguments = parser.parse_args(argv)
    published = json.loads(PUBLISHED.read_text())
    record = json.loads(COUNTED.read_text()) if COUNTED.exists() else {"macs": {}}
    if not arguments.table:
        settings = [setting for setting in published["settings"] if setting["group"] in arguments.only]
        for setting in track(settings, "Counting"):
            record["macs"][key(setting)] = count(setting)
        record["versions"] = {"torch": torch.__version__, "timm": timm.__version__, "effvit": effvit.__version__}
        COUNTED.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), table(published, record["macs"])))


if __name__ == "__main__":
    main()
