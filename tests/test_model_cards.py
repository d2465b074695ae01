"""Model cards, metafiles, model-index.yml and the tables of README.md are what their data and records say."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import yaml
from hosts import make_host
from scripts import TOOLS, load_tool

import effvit
from effvit import method_settings
from effvit.architectures import variants
from effvit.hosts import illama, lvvit, vit_nano
from effvit.measure.flops import count_flops
from effvit.measure.published import published
from effvit.reducers import METHODS, Reducer
from effvit.selectors import SELECTORS

ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted((ROOT / "model_cards").glob("[!R]*.md"))
METAFILES = sorted((ROOT / "model_cards").glob("*.metafile.yml"))
FACTS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "model_cards/data").glob("*.yml")}


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield load_tool("make_model_cards")


def test_everything_generated_is_up_to_date() -> None:
    check = [sys.executable, TOOLS / "make_model_cards.py", "--check"]  # in this process other tests registered names
    ended = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_check_names_what_is_stale_and_writes_nothing(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "pages", lambda: {"old.md": "new", "fresh.md": "same", "absent.md": "new"})
    (tmp_path / "old.md").write_text("old")
    (tmp_path / "fresh.md").write_text("same")
    assert tool.main(["--check"]) == 1
    assert re.findall(r"^(\S+) is stale", capsys.readouterr().err, re.MULTILINE) == ["old.md", "absent.md"]
    assert (tmp_path / "old.md").read_text() == "old"
    assert tool.main([]) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == tool.pages() | {"old.md": "new"}
    assert tool.main(["--check"]) == 0


def test_recorded_counts_are_what_the_models_cost(tool: ModuleType) -> None:
    settings, recorded = tool.settings_to_count(), json.loads(tool.MODELS.read_text())["models"]
    assert settings.keys() == recorded.keys(), "run python tools/make_model_cards.py --measure"
    first_of_each_model = {setting["model"]: name for name, setting in reversed(settings.items())}.values()
    names = {name for name, counts in recorded.items() if "macs" in counts}
    names |= {name for name in first_of_each_model if settings[name]["model"] in variants.VARIANTS}
    stale = [name for name in sorted(names) if tool.count(settings[name]) != recorded[name]]
    assert not stale, "run python tools/make_model_cards.py --measure"


@pytest.mark.parametrize(
    "name", ["hot_deit_tiny_patch16_224, defaults, 224", "stvit_swin_tiny_patch4_window7_224, 224"]
)
def test_recorded_counts_are_those_of_a_trace(tool: ModuleType, name: str) -> None:
    model = timm.create_model(name.partition(",")[0]).eval()
    assert count_flops(model, (3, 224, 224), strict=True).total == tool.read(tool.MODELS)["models"][name]["macs"]


def test_every_architecture_has_its_figures_in_exactly_one_card() -> None:
    rows = [line for card in CARDS for line in set(re.findall(r"^\| `(\w+)` \|", card.read_text(), re.MULTILINE))]
    for name in (*variants.VARIANTS, *lvvit.default_cfgs, *illama.default_cfgs, *vit_nano.default_cfgs):
        assert rows.count(name) == 1, name


def test_every_method_has_a_card_with_its_default_hosts() -> None:
    for method in effvit.list_methods():
        card = (ROOT / "model_cards" / f"{method}.md").read_text()
        assert f"`{method}_deit_small_patch16_224`" in card


def test_cards_say_which_methods_serve_hosts_with_windows() -> None:
    """Those that act inside windows; of others the hosts are all without windows, or those with a class token."""
    for name, method in METHODS.items():
        serves = method.group is not Reducer.group or method.shrink is not Reducer.shrink
        of_all = re.findall(r"^- Hosts: all\b(?! without windows)", FACTS[name]["facts"], re.MULTILINE)
        assert bool(of_all) == serves, name


def test_cards_of_methods_with_parameters_say_that_these_are_not_the_weights_of_the_host() -> None:
    """In what is said of weights, which models on the Hub repeat."""
    host = make_host("class_token")
    for name, method in METHODS.items():
        reducers = effvit.sparsify(host, name, **method.example()).reducers.values()
        has_parameters = any(True for reducer in reducers for _ in reducer.parameters())
        assert has_parameters == (" own" in FACTS[name].get("weights", "")), name


def test_cards_metafiles_and_facts_belong_together() -> None:
    assert {card.stem for card in CARDS} == FACTS.keys() == {path.name.split(".")[0] for path in METAFILES}
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    assert index == {"Import": [path.relative_to(ROOT).as_posix() for path in METAFILES]}


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_names_in_snippets_are_registered(card: Path) -> None:
    text = card.read_text()
    in_timm = re.findall(r'create_model\("(\w+)"', text)
    in_openmmlab = re.findall(r'model_name="(\w+)"', text)
    assert len(in_timm) == len(in_openmmlab) == 1
    assert set(in_timm + in_openmmlab) <= set(effvit.list_models())


@pytest.mark.parametrize("family", FACTS)
def test_settings_in_snippets_are_those_of_the_model(family: str) -> None:
    example = FACTS[family]["example"]
    with torch.device("meta"):
        model = timm.create_model(example["model"], **(example.get("settings", {}) | {"pretrained": False}))
    assert model.pretrained_cfg["architecture"] == example["model"]


@pytest.mark.parametrize("path", METAFILES, ids=lambda path: path.name.split(".")[0])
def test_metafile_has_the_keys_of_openmmlab(path: Path) -> None:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    assert document.keys() == {"Collections", "Models"}
    (collection,) = document["Collections"]
    assert collection.get("Paper", {}).keys() in ({"Title", "URL"}, set())
    assert ("Paper" in collection) == ("paper" in FACTS[path.name.split(".")[0]])
    assert (ROOT / collection["README"]).is_file()
    for model in document["Models"]:
        assert model["In Collection"] == collection["Name"]
        if "Config" in model:
            assert (ROOT / model["Config"]).is_file()
        else:
            assert all(isinstance(model["Metadata"][name], int) for name in ("FLOPs", "Parameters"))
        for result in model.get("Results", []):
            assert {"Task", "Dataset", "Metrics", "Origin"} == result.keys()
            assert all(0 <= value <= 100 for value in result["Metrics"].values())


def test_names_in_metafiles_are_unique() -> None:
    names = [model["Name"] for path in METAFILES for model in yaml.safe_load(path.read_text())["Models"]]
    assert len(names) == len(set(names))


def test_every_config_on_a_model_of_the_zoo_is_in_one_metafile(tool: ModuleType) -> None:
    models = [model for path in METAFILES for model in yaml.safe_load(path.read_text())["Models"]]
    listed = {model["Config"]: model["Metadata"]["Backbone"] for model in models if "Config" in model}
    backbones, own = import_module("cards.facts").configs(), set(effvit.list_models())
    assert listed == {path: backbone for path, backbone in backbones.items() if backbone in own}
    assert sum("Config" in model for model in models) == len(listed)


def test_backbone_of_a_config_is_its_own_or_that_of_its_base(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text('model = dict(backbone=dict(model_name="tome_deit_small_patch16_224"))\n')
    (tmp_path / "longer.py").write_text('_base_ = ["mmdet::schedules/3x.py", "base.py"]\n')
    (tmp_path / "tagged.py").write_text('model = dict(model_name="tome_vit_base_patch16_224.augreg_in21k_ft_in1k")\n')
    (tmp_path / "data.py").write_text('_base_ = ["mmdet::schedules/3x.py"]\n')
    backbone = import_module("cards.facts").backbone
    assert backbone(tmp_path / "longer.py") == "tome_deit_small_patch16_224"
    assert backbone(tmp_path / "tagged.py") == "tome_vit_base_patch16_224"
    with pytest.raises(ValueError, match=r"data\.py has neither a model_name nor a base"):
        backbone(tmp_path / "data.py")


def test_every_published_figure_has_a_source() -> None:
    for family, facts in FACTS.items():
        assert all(group["source"] for group in facts.get("results", [])), family
        assert facts.get("parameters", {"source": "none"})["source"], family
        for setting in facts.get("models", []):
            assert ("published" in setting) == ("published_in" in setting), family


def test_published_accuracies_are_of_families_with_a_card_and_name_their_source() -> None:
    for entry in published():
        assert entry.family in FACTS
        assert entry.top1.source
        if entry.is_off_the_shelf:
            assert entry.model.startswith(f"{entry.family}_")


def test_results_are_of_models_and_configs_that_exist(tool: ModuleType) -> None:
    facts = import_module("cards.facts")
    backbones, names = facts.configs(), effvit.list_models()
    for family in FACTS:
        for result in facts.results_of(family, FACTS[family]):
            assert result.model in names
            assert result.config is None or backbones[result.config] == result.model


def test_every_selector_has_a_card_with_its_licence_and_what_it_needs(tool: ModuleType) -> None:
    page = (ROOT / "docs/selectors.md").read_text()
    for name, facts in import_module("cards.selectors").selector_facts().items():
        card = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert all(need in card for need in SELECTORS[name].needs())
        assert all(f"`{setting}=" in card for setting in SELECTORS[name].defaults())
        if "code" in facts:
            assert facts["code"]["licence"] in card
        if "arxiv" in facts:
            assert facts["arxiv"] in card
            assert facts["arxiv"] in inspect.getdoc(SELECTORS[name]) + SELECTORS[name].summary


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "divprune: {title: a, minimum: one}\n",
            "must have an entry for every selector and no other; look at aim",
        ),
        (None, r"aim: keys are arxiv, .*, and what is published has a source; got .*published"),
    ],
)
def test_facts_of_selectors_are_complete(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, message: str
) -> None:
    facts = yaml.safe_load((ROOT / "model_cards/selectors.yml").read_text())
    facts["aim"]["published"] = "much"
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "model_cards/selectors.yml").write_text(yaml.safe_dump(facts) if text is None else text)
    selectors = import_module("cards.selectors")
    monkeypatch.setattr(selectors, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=message):
        selectors.selector_facts()


def test_facts_of_no_known_family_are_refused(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model_cards/data").mkdir(parents=True)
    (tmp_path / "model_cards/data/stvitt.yml").write_text("architectures: [stvitt_*]\n")
    facts = import_module("cards.facts")
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    with pytest.raises(
        ValueError, match=r"stvitt\.yml is named after no method, and its 'architectures' match no name"
    ):
        facts.facts_of_all()


def test_readme_without_its_marks_is_refused(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"README\.md must hold '<!-- methods table.*put them back"):
        tool.readme("# effvit\n", [])


def test_a_model_that_was_not_counted_is_refused(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = {"model": "hot_deit_small_patch16_224", "setting": "k 4", "args": {"k": 4}, "size": [224, 224]}
    monkeypatch.setattr(import_module("cards.figures"), "facts_of_all", lambda: {"hot": {"models": [setting]}})
    with pytest.raises(ValueError, match=r"'hot_deit_small_patch16_224, k 4' is not in models.json; run .*--measure"):
        tool.families()


def test_throughput_and_accuracy_are_those_of_profile_records(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conditions = {"batch_size": 32, "input_size": [1, 28, 28], "dtype": "bfloat16", "device": "cuda", "threads": 2}
    conditions |= {"compile": True, "cuda_graphs": False, "images": ["16 pictures of a set"]}
    accuracy = {"value": 91.25, "metric": "top-1", "data": "a set", "origin": "measured here"}
    dense = {"name": "vit_nano_patch4_28", "host": None, "method": None, "settings": {}, "accuracy": accuracy}
    dense |= {"images_per_second": 1000.0, "speedup": 1.0, "interval": [1.0, 1.0]}
    settings = method_settings("evit") | {"keep_rate": 0.5}
    evit = dense | {"name": "evit", "host": "vit_nano_patch4_28", "method": "evit", "settings": settings}
    evit |= {"images_per_second": 1600.0, "speedup": 1.6, "interval": [1.5, 1.7]}
    named = evit | {"host": "deit_small_patch16_224", "settings": method_settings("evit"), "accuracy": None}
    machine = {"processor": "a processor", "torch": "2.11.0", "timm": "1.0.31"}
    record = {"schema": 1, "kind": "profile", "machine": machine, "conditions": conditions}
    records = [record | {"models": [dense, evit]}, record | {"models": [dense, named]}, {"kind": "another"}]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(records))
    speeds = import_module("cards.speeds")
    own, on_timm = speeds.of_profiles("evit", {}, [path])
    assert own[:5] == ("evit on vit_nano_patch4_28", "keep_rate 0.5", 1600.0, 1.6, (1.5, 1.7))
    assert on_timm[:2] == ("evit_deit_small_patch16_224", "defaults")
    assert (own.accuracy, on_timm.accuracy) == ("91.2 % top-1 (a set)", "")
    assert own.conditions == (
        "batch 32, 28 x 28, bfloat16, cuda, 2 threads, 16 pictures of a set, compile; a processor, torch 2.11.0, "
        "timm 1.0.31; [gpu.json](../docs/benchmarks/gpu.json)"
    )
    facts = {"architectures": ["vit_nano_*"]}
    (baseline,) = speeds.of_profiles("vit_nano", facts, [path])
    assert (baseline.model, baseline.speedup) == ("vit_nano_patch4_28", 1.0)
    (reached,) = speeds.accuracies_of("vit_nano", facts, [path])
    assert reached.model == "vit_nano_patch4_28"
    assert reached[3:6] == ("a set", {"Top 1 Accuracy": 91.25}, "measured here, docs/benchmarks/gpu.json")
    monkeypatch.setattr(import_module("cards.figures"), "profiles", lambda: [path])
    families = {family.name: family for family in tool.families()}
    assert families["vit_nano"].rows[0].results == [reached]
    assert not any(reached.source == r.source for row in families["evit"].rows for r in row.results)
