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
OUTCOMES = {"right": "✓", "refused": "", None: "·"}


def _marks(*facts: bool) -> list[str]:
    return ["✓" if fact else "" for fact in facts]


def capabilities_table() -> list[str]:
    """Lines of the table of methods and what they can do."""
    verdicts = read(VERDICTS)
    rows = []
    for name, method in METHODS.items():
        own = verdicts.get(name, {})
        marks = [
            *_marks(method.needs_class_token, method.learns, method.variable_length, method.keeps_every_patch),
            *_marks(method.groups() or method.shrinks()),
            *(OUTCOMES[own.get(recorder)] for recorder in GRAPHS.values()),
            *_marks(any(method.ladders(12, 196))),
        ]
        rows.append([f"`{name}`", *marks, str(len(list_models(f"{name}_*")))])
    return table(COLUMNS, rows)
