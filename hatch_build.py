"""What hatchling is told beside pyproject.toml: where the wheel gets its configs, and a README for package indexes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:|#)(?P<target>[^)\s]+)\)")
BRANCH = "main"


class ConfigsInWheel(BuildHookInterface):
    """Puts ``configs/`` into the wheel as ``effvit/configs``, where ``effvit.dense.shipped_configs`` looks for them.

    hatchling's ``force-include`` for wheels alone: an editable installation would get a copy that nothing reads.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds the "standard" or the "editable" wheel."""
        if version == "standard":
            build_data["force_include"]["configs"] = "effvit/configs"


class ReadmeForIndexes(MetadataHookInterface):
    """Makes README.md the description, without a link that leads nowhere from the page of a package index."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling to fill in what pyproject.toml lists as dynamic."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {"content-type": "text/markdown", "text": readable_elsewhere(text, source)}


def readable_elsewhere(text: str, source: str | None) -> str:
    """A page of the repository with its relative links made absolute.

    Args:
        text: The page, in Markdown.
        source: The repository's address. While there is none, links become their text, and images their description.
    """

    def instead(link: re.Match[str]) -> str:
        if source is None:
            return link["text"]
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({source.rstrip('/')}/{kind}/{BRANCH}/{link['target']})"

    return RELATIVE_LINK.sub(instead, text)
