"""What is recorded equals the plain run on other images, batches and sizes, or is refused by an error that helps.

Expectations are the plain run of the same model, and ``recorders.REFUSALS``. A covering part of the product runs by
default: every method under every recorder that takes no more than seconds, and each setting, host and architecture
under some; the rest with ``-m release``.
``python tests/test_export.py RECORDER MODEL`` runs what the patterns fit and writes export_verdicts.json,
onnx_operators.json, docs/export.md and the tables of docs/deployment.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from architectures import SMALL
from deployment_page import LISTED, RESTRICTED, deployment_page
from hosts import SETTINGS, released
from recorders import (
    CASES,
    DEPLOYED,
    RECORDERS,
    SLOW,
    Refusal,
    export_page,
    judge,
    make_case,
    num_lost,
    pairs,
    recorded_images,
    refusal,
)
from runtimes import operators
from timm.models.vision_transformer import VisionTransformer
from torch._dynamo.testing import CompileCounter

import effvit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"
DEPLOYMENT = PAGE.with_name("deployment.md")
VERDICTS = Path(__file__).with_name("export_verdicts.json")
OPERATORS = Path(__file__).with_name("onnx_operators.json")
# What was wrong once, and for recorders that take long what stands for methods, hosts and architectures.
NAMED = {
    ("torch.export, dynamic height", "zero_tprune dynamic_img_size"),
    ("torch.jit.trace", "evit dynamic_img_size eva02"),
    ("torch.jit.trace", "ats dynamic_img_size eva02"),
    ("torch.jit.trace", "dymu compat"),
    ("torch.fx", "gtp sparsity=0.6"),
    ("torch.fx", "dymu packed eva02"),
    ("torch.fx", "stvit dynamic"),
    ("per-sample gradients", "sit_6c"),
    ("torch.onnx, dynamo=True", "tome average_pool"),
    ("torch.onnx, dynamo=True", "evit dinov3"),
    ("torch.onnx, dynamo=True", "casvit"),
    ("torch.onnx, dynamo=True", "ats"),
    ("torch.onnx, dynamo=True", "dymu compat"),
    ("torch.compile", "evit"),
    ("torch.compile", "ats packed eva02"),
    ("torch.export, dynamic size", "evit dynamic_img_size"),
    ("torch.export, dynamic size", "hot dynamic_img_size"),
    ("torch.compile, dynamic", "evit"),
}


def chosen() -> set[tuple[str, str]]:
    """A part of all pairs that names every recorder, case and base method."""
    recorders, cases = list(RECORDERS), list(CASES)
    part = set(NAMED)
    for recorder, case in pairs():
        stride = 1 if case in SETTINGS else 3 if case in SMALL else 12
        quick = recorder not in SLOW or recorder == "torch.export, dynamic batch"
        if quick and (recorders.index(recorder) + cases.index(case)) % stride == 0:
            part.add((recorder, case))
    for pair in sorted(pairs(), key=lambda pair: pair[0] in SLOW):  # of what the choice by places left out, one each
        if any(pair[i] not in {chosen[i] for chosen in part} for i in (0, 1)):
            part.add(pair)
    return part


@pytest.mark.parametrize(("recorder", "case"), released(pairs(), chosen()))
def test_what_is_recorded_equals_the_plain_run_or_is_refused(recorder: str, case: str) -> None:
    verdict = judge(recorder, case)
    expected = refusal(recorder, case)
    assert verdict.outcome == outcome_of(expected), verdict.detail
    if expected is not None:
        assert re.search(expected.match, verdict.detail), verdict.detail


def outcome_of(expected: Refusal | None) -> str:
    """The outcome that a verdict must have where so much, or nothing, stands against the model."""
    return "right" if expected is None else "refused"


def test_the_part_run_by_default_names_every_recorder_and_case() -> None:
    """Law of the choice: a recorder or model that is added is run."""
    part = chosen()
    assert part <= set(pairs())
    assert {recorder for recorder, _ in part} == set(RECORDERS)
    assert {case for _, case in part} == set(CASES)


def test_the_page_of_exports_is_up_to_date() -> None:
    """docs/export.md is made from the recorded verdicts."""
    assert PAGE.read_text() == export_page(json.loads(VERDICTS.read_text()))


def test_the_tables_of_deployments_are_up_to_date() -> None:
    """Those of docs/deployment.md are made from the recorded verdicts and operators."""
    page = DEPLOYMENT.read_text()
    assert page == deployment_page(page, json.loads(VERDICTS.read_text()), json.loads(OPERATORS.read_text()))


def test_every_model_was_run_in_every_runtime_and_format_of_the_page() -> None:
    """Law of the record: other recorders may leave a dot, these have no other page."""
    verdicts, found = json.loads(VERDICTS.read_text()), json.loads(OPERATORS.read_text())
    own = [(recorder, case) for recorder, case in pairs() if RECORDERS[recorder].only_deployed]
    assert {recorder for recorder, _ in own} >= {
        "OpenVINO",
        "onnxruntime, int8",
        "torchao, int8",
        "bfloat16",
        "float16",
    }
    assert [(recorder, case) for recorder, case in own if recorder not in verdicts.get(case, {})] == []
    assert found.keys() == set(DEPLOYED)


def test_every_operator_was_looked_up_in_the_list_of_tensorrt() -> None:
    """The list is that of deployment_page.py; a graph with another operator needs another look."""
    occurring = {operator for operators in json.loads(OPERATORS.read_text()).values() for operator in operators}
    assert occurring == {*LISTED, *RESTRICTED}


@pytest.mark.parametrize("case", released(DEPLOYED, {"evit"}))
def test_recorded_operators_are_those_of_the_graph(case: str) -> None:
    assert json.loads(OPERATORS.read_text())[case] == operators(make_case(case).float(), recorded_images(case))


def test_rounded_scores_are_right_while_nearest_to_their_own_image() -> None:
    """Worked by hand: of three images on a line the last comes to lie nearer to the second."""
    plain = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert num_lost(plain + 0.4, plain) == 0
    assert num_lost(torch.tensor([[0.4, 0.0], [1.4, 0.0], [1.4, 0.0]]), plain) == 1


def test_no_recorded_verdict_is_wrong_or_other_than_expected() -> None:
    """The verdicts the page shows are those this file expects."""
    for case, outcomes in json.loads(VERDICTS.read_text()).items():
        for recorder, outcome in outcomes.items():
            assert outcome == outcome_of(refusal(recorder, case)), (recorder, case)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("evit", {"reduce_at": (0,)}), ("ats", {"reduce_at": (0,), "keep_rate": 0.9}), ("hot", {"reduce_at": (0,)})],
)
def test_a_keep_rate_schedule_compiles_three_graphs_at_most(method: str, settings: dict[str, object]) -> None:
    """One for the first rate, one for a rate that changes, and one for rate 1 or the first change of a count."""
    host = VisionTransformer(img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()
    model = effvit.sparsify(host, method, **settings)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        for step in range(8):
            model.set_keep_rate(effvit.cosine_keep_rate(step, 1, 0.5, 0, 8))
            assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3


@pytest.mark.parametrize(("method", "settings"), [("ats", {"reduce_at": (1,)}), ("dymu", {"thresholds": (0.9,) * 2})])
def test_packed_batches_compile_with_breaks_in_the_graph(method: str, settings: dict[str, object]) -> None:
    """The plain run is the expectation: only ``fullgraph=True`` meets the refusal."""
    host = VisionTransformer(img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()
    model = effvit.sparsify(host, method, ragged="packed", **settings)
    x = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="eager")(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_trace_that_is_only_read_counts_as_a_plain_run() -> None:
    """count_flops reads its trace once: packed and padded ATS have the same tokens of one image, so the same MACs."""
    host = VisionTransformer(img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()
    padded, packed = (
        effvit.count_flops(effvit.sparsify(host, "ats", reduce_at=(0,), ragged=ragged), (3, 48, 48)).by_module
        for ragged in ("padded", "packed")
    )
    assert padded["blocks.1.mlp"] == packed["blocks.1.mlp"]
    slots = effvit.sparsify(host, "ats", reduce_at=(0,), drop_tokens=False)
    assert padded["blocks.1.mlp"] < effvit.count_flops(slots, (3, 48, 48)).by_module["blocks.1.mlp"]


def record(recorder_pattern: str, case_pattern: str) -> None:
    """Judge the combinations that fit, and write verdicts and pages anew."""
    verdicts, found = json.loads(VERDICTS.read_text()), json.loads(OPERATORS.read_text())
    for recorder, case in pairs():
        if re.search(recorder_pattern, recorder) and re.search(case_pattern, case):
            verdict = judge(recorder, case)
            verdicts.setdefault(case, {})[recorder] = verdict.outcome
            print(recorder, case, *verdict, sep=" | ", flush=True)
            if recorder == "OpenVINO" and verdict.outcome == "right":
                found[case] = operators(make_case(case), recorded_images(case))
    VERDICTS.write_text(json.dumps(verdicts, indent=1, sort_keys=True) + "\n")
    OPERATORS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(export_page(verdicts))
    DEPLOYMENT.write_text(deployment_page(DEPLOYMENT.read_text(), verdicts, found))


if __name__ == "__main__":
    record(*sys.argv[1:3])
