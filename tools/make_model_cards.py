"""Write the model cards, their metafiles, model-index.yml and the tables of methods in README.md from one source.

What a card on a hub says of a paper and its code goes into the package: effvit/show/families.json. The selectors of the
tokens that leave towers have a page, docs/selectors.md, of model_cards/selectors.yml.

What no program can know (papers, licences, published results) stands in model_cards/data, published top-1 accuracies
in effvit/measure/published_top1.json; counts and measurements are read from docs/benchmarks. Nothing is typed into a
card by hand.

    python tools/make_model_cards.py             # write them
    python tools/make_model_cards.py --check     # name what is stale, exit with 1 if anything is
    python tools/make_model_cards.py --measure   # first count every model of the cards into docs/benchmarks/models.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from cards.capabilities import capabilities_table
from cards.facts import ROOT, Result, read
from cards.figures import MODELS, Family, Row, count, families, settings_to_count
from cards.page import arxiv, bibtex, card, code_link, code_url, paper_link, table
from cards.selectors import selector_page
from marked_table import put_table, write_pages
from rich.progress import track

import effvit
from effvit.reducers import METHODS

__all__ = ["hub_facts", "main", "metafile", "pages", "readme_table"]

CARDS = "model_cards"
TOOL = "make_model_cards.py"
HUB_FACTS = "effvit/show/families.json"


def _results(results: list[Result]) -> dict[str, Any]:
    entries = [
        {"Task": result.task, "Dataset": result.dataset, "Metrics": result.metrics, "Origin": result.source}
        for result in results
    ]
    return {"Results": entries} if entries else {}


def _name(row: Row) -> str:
    words = "" if row.is_default else re.sub(r"[^\w.]+", "-", f"_{row.setting['setting']}")
    return row.setting["model"] + words


def metafile(family: Family) -> str:
    """The family in OpenMMLab's metafile format: classifiers by name and setting, then every config."""
    facts = family.facts
    collection: dict[str, Any] = {
        "Name": facts["title"],
        "Metadata": {"Architecture": [facts["title"]]},
        **({"Paper": {"Title": facts["paper"]["title"], "URL": arxiv(facts)}} if "paper" in facts else {}),
        "README": f"{CARDS}/{family.name}.md",
    }
    if "code" in facts:
        collection["Code"] = {"URL": code_url(facts), "Version": facts["code"]["commit"]}
    models: list[dict[str, Any]] = [
        {
            "Name": _name(row),
            "In Collection": facts["title"],
            "Metadata": {"FLOPs": row.macs, "Parameters": row.parameters},
            **_results(row.results),
        }
        for row in family.rows
    ]
    models += [
        {
            "Name": Path(path).stem,
            "In Collection": facts["title"],
            "Metadata": {"Backbone": backbone},
            "Config": path,
            **_results([result for result in family.results if result.config == path]),
        }
        for path, backbone in family.configs.items()
    ]
    return yaml.safe_dump({"Collections": [collection], "Models": models}, sort_keys=False, width=120)


def hub_facts(family: Family) -> dict[str, str | list[str]]:
    """The family as an entry of families.json: the fields of ``effvit.show.model_card.Family`` that it has."""
    facts = family.facts
    entry: dict[str, str | list[str]] = {"title": facts["title"]}
    if "architectures" in facts:
        entry["models"] = facts["architectures"]
    if "paper" in facts:
        entry |= {"paper": paper_link(facts), "bibtex": "\n".join(bibtex(family.name, facts))}
    if "code" in facts:
        entry |= {"code": code_link(facts), "code_licence": facts["code"]["licence"]}
    if family.name in METHODS and "weights" in facts:
        entry["weights"] = " ".join(facts["weights"].splitlines())
    return entry


def readme_table(cards: list[Family], of_methods: bool) -> list[str]:
    """Lines of the table of methods, or of architectures, in README.md."""
    rows = []
    for family in (family for family in cards if (family.name in METHODS) == of_methods):
        facts = family.facts
        paper = f"[{facts['paper']['arxiv']}]({arxiv(facts)})" if "paper" in facts else "none"
        for entry in facts["readme"]:
            names = ", ".join(f"[`{name}`]({CARDS}/{family.name}.md)" for name in entry["names"])
            settings = ", ".join(f"`{name}`" for name in entry.get("settings", []))
            rows.append([names, paper, entry["text"], settings])
    what = ("name", "what happens to tokens") if of_methods else ("names", "what it is")
    return table(dict.fromkeys((what[0], "paper", what[1], "main settings"), "left"), rows)


def readme(text: str, cards: list[Family]) -> str:
    """README.md with its three tables made anew; raises ValueError if a mark is missing."""
    tables = {
        "methods": readme_table(cards, True),
        "capabilities": capabilities_table(),
        "architectures": readme_table(cards, False),
    }
    for name, lines in tables.items():
        text = put_table(text, "README.md", name, TOOL, lines)
    return text


def pages() -> dict[str, str]:
    """File, relative to the repository -> what it should hold."""
    cards = families()
    made = {f"{CARDS}/{family.name}.metafile.yml": metafile(family) for family in cards}
    made["model-index.yml"] = yaml.safe_dump({"Import": sorted(made)})
    made |= {f"{CARDS}/{family.name}.md": card(family) for family in cards}
    hub = {family.name: hub_facts(family) for family in cards}
    made[HUB_FACTS] = json.dumps(hub, indent=1, ensure_ascii=False) + "\n"
    made["docs/selectors.md"] = selector_page()
    made["README.md"] = readme((ROOT / "README.md").read_text(), cards)
    return made


def measure() -> None:
    """Count every model of the cards."""
    models = {name: count(setting) for name, setting in track(settings_to_count().items(), "Counting")}
    versions = {"torch": torch.__version__, "timm": timm.__version__, "effvit": effvit.__version__}
    MODELS.write_text(json.dumps({"versions": versions, "models": models}, indent=1) + "\n")
    read.cache_clear()


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the files; returns 1 if some are stale."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name the files that are stale")
    parser.add_argument("--measure", action="store_true", help="count parameters and multiply-adds first")
    arguments = parser.parse_args(argv)
    if arguments.measure:
        measure()
    return write_pages(pages(), ROOT, TOOL, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
