"""What each method can do, read from its class, the names that timm knows and the outcomes of tests/test_export.py."""

from __future__ import annotations

from cards.facts import ROOT, read
from cards.page import table
from effvit.reducers import METHODS
from effvit.zoo import list_models

__all__ = ["capabilities_table"]

VERDICTS = ROOT / "tests/export_verdicts.json"
GRAPHS = {"exports": "torch.export, dynamic batch", "ONNX": "torch.onnx, dynamo=True"}
COLUMNS = {
    "method": "left",
    "needs a class token": "left",
    "learns": "left",
    "as many as the image needs": "left",
    "no patch is lost": "left",
    "inside windows": "left",
    **dict.fromkeys(GRAPHS, "left"),
    "`effvit tune`": "left",
    "names": "right",
}


def capabilities_table() -> list[str]:
    """Lines of the table of methods and what they can do."""
    verdicts = read(VERDICTS)
    rows = []
    for name, method in METHODS.items():
        facts = (
            method.needs_class_token,
            method.learns,
            method.variable_length,
            method.keeps_every_patch,
            method.groups() or method.shrinks(),
            *(verdicts[name][recorder] == "right" for recorder in GRAPHS.values()),
            any(method.ladders(12, 196)),
        )
        marks = ["✓" if fact else "" for fact in facts]
        rows.append([f"`{name}`", *marks, str(len(list_models(f"{name}_*")))])
    return table(COLUMNS, rows)
