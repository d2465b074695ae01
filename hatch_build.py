"""Puts ``configs/`` into the wheel as ``effvit/configs``, where ``effvit.dense.shipped_configs`` looks for them."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfigsInWheel(BuildHookInterface):
    """hatchling's ``force-include`` for wheels alone: an editable installation would get a copy that nothing reads."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds the "standard" or the "editable" wheel."""
        if version == "standard":
            build_data["force_include"]["configs"] = "effvit/configs"
