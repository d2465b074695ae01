"""Options and reports shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import detectron2_stub
import drawn_set as drawn
import pytest
import torch

pytest.register_assert_rewrite("effvit.testing")

DEFAULT_GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
# Files of the fast level, `make check`: the core, every method by itself and in the contract, hosts, images and what
# documents say. They need neither OpenMMLab nor any file beside the checkout; single tests of them that take long or
# need one of these are marked `slow`.
FAST = {
    "test_accuracy.py",
    "test_algm.py",
    "test_atc.py",
    "test_ats.py",
    "test_attentive_mask.py",
    "test_attention.py",
    "test_bad_input.py",
    "test_compat.py",
    "test_completion.py",
    "test_contract.py",
    "test_cubistmerge.py",
    "test_diffrate.py",
    "test_docs.py",
    "test_doctor.py",
    "test_dpcknn.py",
    "test_dymu.py",
    "test_dynamicvit.py",
    "test_evit.py",
    "test_expedite.py",
    "test_golden.py",
    "test_golden_readers.py",
    "test_gtp.py",
    "test_hiera.py",
    "test_hot.py",
    "test_images.py",
    "test_imports.py",
    "test_kernels.py",
    "test_kmedoids.py",
    "test_labelled.py",
    "test_learnt_weights.py",
    "test_messages.py",
    "test_mixing.py",
    "test_named_images.py",
    "test_own_data.py",
    "test_pictures.py",
    "test_pitome.py",
    "test_plots.py",
    "test_recording.py",
    "test_reads.py",
    "test_records.py",
    "test_relpos.py",
    "test_recover.py",
    "test_register.py",
    "test_report.py",
    "test_robust_attention.py",
    "test_sam.py",
    "test_schedule.py",
    "test_semantic_tokens.py",
    "test_shipped_configs.py",
    "test_site.py",
    "test_static_selection.py",
    "test_swin.py",
    "test_tiny_vit.py",
    "test_token_stages.py",
    "test_tokens.py",
    "test_tome.py",
    "test_tutorials.py",
    "test_vid_tldr.py",
    "test_visualize.py",
    "test_windows.py",
    "test_written_files.py",
    "test_zero_tprune.py",
}
golden_errors: dict[str, dict[str, float]] = {}


@pytest.fixture(autouse=True)
def _same_excepthook() -> Iterator[None]:
    """torch.distributed puts one in its place that begins each line with the rank, and leaves it there."""
    before = sys.excepthook
    yield
    sys.excepthook = before


@pytest.fixture(autouse=True)
def _no_logger_of_another_test() -> Iterator[None]:
    """mmengine names loggers by config and second: one of an earlier test would write to a stream that is closed."""
    yield
    if logging := sys.modules.get("mmengine.logging"):
        loggers = logging.MMLogger._instance_dict
        for handler in [handler for logger in loggers.values() for handler in logger.handlers]:
            handler.close()
        loggers.clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(os.environ.get("EFFVIT_GOLDEN", DEFAULT_GOLDEN)),
        help="golden cases beside those of tests/golden (default: shared/golden beside the checkout)",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out files of which ``-m fast`` runs nothing: they need not be importable, and importing takes a minute."""
    left_out = collection_path.name.startswith("test_") and collection_path.name not in FAST
    return True if config.option.markexpr == "fast" and left_out else None


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.name in FAST and not any(item.get_closest_marker(level) for level in ("slow", "release")):
        item.add_marker("fast")


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
