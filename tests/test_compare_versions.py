"""``tools/compare_versions.py``: this checkout beside a version out of git."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_version_is_measured_beside_itself(tmp_path: Path) -> None:
    """In a process of its own: the earlier version registers timm's names anew."""
    target = tmp_path / "compare.json"
    options = ["--model", "test_vit", "--batch-size", "1", "--rounds", "2", "--only", "evit 0.5", "--json", target]
    done = subprocess.run(
        [sys.executable, ROOT / "tools/compare_versions.py", "HEAD", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "outputs differ" not in done.stdout
    (row,) = json.loads(target.read_text())["results"]
    assert row["name"] == "EViT 0.5"
    assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
