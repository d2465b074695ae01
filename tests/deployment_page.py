"""The tables of docs/deployment.md, from what tests/test_export.py recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recorders import CASES, DEPLOYED, Refusal, refusal

__all__ = ["COLUMNS", "LISTED", "RESTRICTED", "deployment_page", "operator_table", "outcome_table"]

Verdicts = Mapping[str, Mapping[str, str]]
COLUMNS = {  # heading: recorder
    "compile": "torch.compile",
    "pt2": "torch.export",
    "pt2, batch": "torch.export, dynamic batch",
    "pt2, height": "torch.export, dynamic height",
    "pt2, size": "torch.export, dynamic size",
    "ONNX": "torch.onnx, dynamo=True",
    "legacy ONNX": "torch.onnx, dynamo=False, dynamic batch",
    "OpenVINO": "OpenVINO",
    "ONNX int8": "onnxruntime, int8",
    "torchao int8": "torchao, int8",
    "bf16": "bfloat16",
    "fp16": "float16",
    "channels_last": "channels_last",
}
# Models that take images of any size are other models where a host is made for one size.
OF_ANY_SIZE = {"lookupvit": "lookupvit_dynamic", "stvit": "stvit dynamic"}
# ONNX operators that occur and stand in docs/operators.md of onnx/onnx-tensorrt (96e7810, TensorRT 10.1), restricted in
# types at most, or to axes that are constants; and those with another restriction.
# fmt: off
LISTED = [
    "Abs", "Add", "And", "ArgMax", "ArgMin", "BatchNormalization", "Cast", "Clip", "Concat", "ConstantOfShape",
    "Conv", "CumSum", "Div", "Elu", "Equal", "Exp", "Expand", "Floor", "Gather", "GatherElements", "GatherND",
    "Gelu", "Gemm", "Greater", "GreaterOrEqual", "HardSwish", "Identity", "IsInf", "IsNaN", "LayerNormalization",
    "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "Range",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
    "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt",
    "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
]
# fmt: on
RESTRICTED = {
    "EyeLike": "the shape of its input must be fixed",
    "ScatterElements add": "listed without a word on reductions",
    "ScatterND add": "not with a reduction",
    "TopK": "K below 3840",
}


def case_of(model: str, recorder: str) -> str | None:
    """The case whose verdict a cell shows; None where the recorder is for models of any size and this one has none."""
    if not recorder.endswith(("dynamic height", "dynamic size")) or CASES[model].other is not None:
        return model
    other = OF_ANY_SIZE.get(model, f"{model} dynamic_img_size")
    return other if other in CASES else None


def outcome_table(verdicts: Verdicts) -> list[str]:
    """Lines of the table of models and ways to deploy them, with what is refused and why below it."""
    letters: dict[Refusal, str] = {}
    rows = []
    for model in DEPLOYED:
        cells = [mark(verdicts, case_of(model, recorder), recorder, letters) for recorder in COLUMNS.values()]
        rows.append(f"| {model} | {' | '.join(cells)} |")
    head = [f"| model | {' | '.join(COLUMNS)} |", f"|---|{':-:|' * len(COLUMNS)}"]
    return [*head, *rows, "", *(f"- **{letter}**: {entry.note}" for entry, letter in letters.items())]


def mark(verdicts: Verdicts, case: str | None, recorder: str, letters: dict[Refusal, str]) -> str:
    """A cell: works, the letter of a refusal (a new one is added to them), not run, or no such model."""
    if case is None:
        return ""
    outcome = verdicts.get(case, {}).get(recorder)
    if outcome is None:
        return "·"
    entry = refusal(recorder, case)
    if outcome == "right" or entry is None:
        return "✓" if outcome == "right" else outcome
    return letters.setdefault(entry, chr(ord("a") + len(letters)))


def operator_table(operators: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of the table of the operators that TensorRT takes with a restriction, and which models have them."""
    lines = ["| operator | in the graphs of | TensorRT 10.1 |", "|---|---|---|"]
    for operator, restriction in RESTRICTED.items():
        models = [model for model in DEPLOYED if operator in operators.get(model, ())]
        lines.append(f"| {operator} | {', '.join(models)} | {restriction} |")
    return lines


def deployment_page(page: str, verdicts: Verdicts, operators: Mapping[str, Sequence[str]]) -> str:
    """The page with both tables made anew between their marks."""
    for name, lines in (("outcome", outcome_table(verdicts)), ("operator", operator_table(operators))):
        begin, end = f"<!-- {name} table: written by tests/test_export.py -->\n", f"<!-- end of {name} table -->"
        assert begin in page, begin
        assert end in page, end
        before, _, rest = page.partition(begin)
        page = before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    return page
