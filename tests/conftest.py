"""Options and reports shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import detectron2_stub
import drawn_set as drawn
import pytest
import torch

pytest.register_assert_rewrite("effvit.testing")

DEFAULT_GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
golden_errors: dict[str, dict[str, float]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(os.environ.get("EFFVIT_GOLDEN", DEFAULT_GOLDEN)),
        help="folder of golden cases, one sub-folder a method (default: shared/golden beside the checkout)",
    )


@pytest.fixture(autouse=True)
def _fresh_state():
    """One thread count, one seed and an empty compile cache for every test."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def _threads():
    several = "PYTEST_XDIST_WORKER" in os.environ  # one core for each process of `pytest -n`
    torch.set_num_threads(1 if several else min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 holds


@pytest.fixture(scope="session")
def drawn_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of drawn cut-outs and backgrounds, see drawn_set.py."""
    root = tmp_path_factory.mktemp("sources")
    drawn.write_sources(root)
    return root


@pytest.fixture(scope="session")
def drawn_set(drawn_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detection and segmentation set made of them; read only."""
    out = tmp_path_factory.mktemp("drawn_set") / "set"
    drawn.make(drawn_sources, out)
    return out


@pytest.fixture
def detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for detectron2, which is on no package index."""
    for name, module in detectron2_stub.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "effvit.dense.detectron2", raising=False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties if report.when == "call" else ():
        if name == "golden error":
            method, case, error = value
            golden_errors.setdefault(method, {})[case] = error


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for method, errors in golden_errors.items():
        worst = max(errors, key=errors.__getitem__)
        terminalreporter.write_line(
            f"golden {method}: {len(errors)} cases compared, worst relative error {errors[worst]:.1e} ({worst})"
        )
