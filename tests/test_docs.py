"""Figures in the documents are those of the measured files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image, ImageChops, ImageStat
from scripts import TOOLS, load_tool

import effvit
from effvit.cli import main
from effvit.measure.records import read_profiles

ROOT = Path(__file__).resolve().parents[1]


def shown_table(document: str, name: str) -> list[str]:
    """Lines of the table between the marks of that name."""
    text = (ROOT / document).read_text()
    table = re.search(rf"<!-- {name} table.*?-->\n(.*?)<!-- end of {name} table -->", text, re.DOTALL)
    assert table is not None
    return table.group(1).strip().splitlines()


def test_readme_and_speed_page_show_the_measured_overhead(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_tool("make_speed_page").main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "name", "tool", "record"),
    [
        ("docs/dense.md", "recovery", "benchmark_recovery", "recovery_cpu.json"),
        ("docs/dense.md", "training", "compare_training", "composites_cpu.json"),
        ("docs/dense.md", "algm and hot", "compare_training", "composites_algm_hot_cpu.json"),
        ("docs/dense.md", "vit", "compare_training", "composites_vit_cpu.json"),
        ("docs/dense.md", "segmentation", "evaluate_dense", "segmentation_cpu.json"),
        ("docs/dense.md", "segmentation fine-tuned", "compare_training", "segmentation_finetuned_cpu.json"),
        ("docs/dense.md", "garments", "compare_training", "garments_cpu.json"),
        ("docs/accuracy.md", "accuracy", "make_accuracy_page", "fashion_accuracy_cpu.json"),
        ("docs/accuracy.md", "cutouts training", "training_log", "cutouts_training_cpu.json"),
        ("docs/accuracy.md", "cutouts fine-tuned", "compare_training", "cutouts_finetuned_cpu.json"),
        ("docs/accuracy.md", "masks", "evaluate_masks", "mobilesam_cpu.json"),
        ("docs/profile.md", "check", "check_profiler", "profiler_check_cpu.json"),
        ("docs/profile.md", "tune", "check_tune", "tune_cpu.json"),
        ("docs/profile.md", "tune free", "check_tune", "tune_free_cpu.json"),
        ("docs/select_tokens.md", "selectors", "benchmark_selectors", "selectors_cpu.json"),
        ("docs/speed.md", "hosts", "benchmark_hosts", "hosts_cpu.json"),
        ("docs/speed.md", "official", "benchmark_official", "official_cpu.json"),
        ("docs/deployment.md", "deployment", "benchmark_deployment", "deployment_cpu.json"),
        ("docs/checkpoints.md", "transformers", "compare_transformers", "transformers_checkpoints.json"),
    ],
)
def test_pages_show_the_measured_tables(document: str, name: str, tool: str, record: str) -> None:
    if tool in ("compare_training", "training_log", "evaluate_dense"):
        pytest.importorskip("mmengine")
    path = ROOT / "docs/benchmarks" / record
    measured = read_profiles(path) if tool == "make_accuracy_page" else json.loads(path.read_text())
    table = load_tool(tool).free_table if name == "tune free" else load_tool(tool).table
    assert shown_table(document, name) == table(measured)


@pytest.mark.parametrize("probe", ["linear", "attention"])
@pytest.mark.parametrize("data", ["cutouts", "garments", "mobilesam"])
def test_what_selected_tokens_still_tell_is_the_measured_table(data: str, probe: str) -> None:
    record = json.loads((ROOT / f"docs/benchmarks/probes_{data}_cpu.json").read_text())
    shown = shown_table("docs/select_tokens.md", f"{data} {probe} probe")
    assert shown == load_tool("measure_probes").table(record, probe)


def test_readme_and_model_cards_name_every_method() -> None:
    readme = (ROOT / "README.md").read_text()
    for method in effvit.list_methods():
        assert f"`{method}`" in readme
        assert (ROOT / "model_cards" / f"{method}.md").is_file()


def test_readme_shows_what_its_command_draws(tmp_path: Path) -> None:
    """Up to how versions of Pillow draw letters."""
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"docs/images/tokens\.png\)\n\n    effvit (visualize .*) --out runs\n", readme)
    assert main([*command.split(), "--out", str(tmp_path)]) == 0
    (drawn,) = tmp_path.iterdir()
    with Image.open(drawn) as now, Image.open(ROOT / "docs/images/tokens.png") as shown:
        assert now.size == shown.size
        assert max(ImageStat.Stat(ImageChops.difference(now, shown)).mean) < 1


def test_documents_link_only_to_files_that_exist() -> None:
    folders = (ROOT / "docs", ROOT / "model_cards", ROOT / "configs")
    for document in (*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


class TestAccuracyPage:
    @pytest.fixture
    def tool(self, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        monkeypatch.syspath_prepend(TOOLS)
        return load_tool("make_accuracy_page")

    def test_table_and_plot_are_of_the_measured_records(
        self, tool: ModuleType, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert tool.main(["--check"]) == 0, capsys.readouterr().err

    def test_check_names_what_is_stale_and_the_command_mends_it(
        self, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = [*tool.ACCURACIES.values(), *tool.CHOICES.values(), *tool.SETTINGS.values()]
        for path in (tool.PAGE, tool.README, *files, *map(tool.plot_of, tool.PLOTTED)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text((ROOT / path).read_text())
        monkeypatch.setattr(tool, "ROOT", tmp_path)
        first = tool.ACCURACIES["accuracy"]
        (tmp_path / first).write_text(json.dumps(json.loads((tmp_path / first).read_text())[:1]))
        assert tool.main(["--check"]) == 1
        stale = re.findall(r"^(\S+) is stale", capsys.readouterr().err, re.MULTILINE)
        assert stale == [tool.PAGE, tool.plot_of(first)]
        assert tool.main([]) == 0
        assert tool.main(["--check"]) == 0

    def test_page_without_marks_is_refused(self, tool: ModuleType) -> None:
        with pytest.raises(ValueError, match=r"docs/accuracy\.md must hold '<!-- accuracy table.* put them back"):
            tool.page("no table", {"accuracy": []}, {}, {})
