"""What an index would get: a wheel and an sdist that are built, read and installed here, away from the checkout."""

from __future__ import annotations

import email
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import effvit

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is tracked is known in a checkout only")
LARGEST_WHEEL = 8_000_000  # bytes
# A user's first minute. It runs where nothing of the checkout is on the path.
FIRST_MINUTE = """
import timm, torch, effvit
from effvit.cli import main
from effvit.dense.shipped_configs import list_configs
from effvit.show.model_card import model_card
from effvit.show.pictures import fashion_pictures

print(effvit.__file__)
vit = timm.create_model("vit_nano_patch4_28", pretrained=True).eval()
cheap = effvit.sparsify(vit, "tome", r=3)
assert cheap(torch.rand(2, 1, 28, 28)).shape == (2, 10)
assert len(fashion_pictures()) == 60
assert model_card(cheap, "me/cheap", license="apache-2.0")["citation"]
assert len(list_configs()) > 50
assert main(["list", "evit_deit_tiny_*"]) == 0
assert main(["report", "costs.json", "--out", "report.html"]) == 2  # reads the page's parts before what is not there
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of the checkout and a wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture
def hatch_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestWheel:
    def test_it_holds_the_package_its_data_and_its_configs_and_nothing_else(self, wheel: Path) -> None:
        names = set(zipfile.ZipFile(wheel).namelist())
        tracked = subprocess.run(
            ["git", "ls-files", "effvit", "configs"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.splitlines()
        expected = {re.sub("^configs/", "effvit/configs/", path) for path in tracked if (ROOT / path).is_file()}
        missing = expected - names
        assert not missing
        others = {name.split("/")[0] for name in names} - {"effvit"}
        assert others == {f"effvit-{effvit.__version__}.dist-info"}

    def test_it_is_small(self, wheel: Path) -> None:
        assert wheel.stat().st_size < LARGEST_WHEEL

    def test_its_description_is_the_readme_without_a_link_that_only_the_repository_has(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
            metadata = email.message_from_bytes(archive.read(name))
        assert metadata["Description-Content-Type"] == "text/markdown"
        description = metadata.get_payload()
        assert isinstance(description, str)
        assert description.startswith("# effvit")
        assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", description)
        assert {"demo", "imagenet", "mm", "transformers"} <= {*metadata.get_all("Provides-Extra", [])}

    def test_it_works_where_there_is_no_checkout(self, wheel: Path, tmp_path: Path) -> None:
        site = tmp_path / "site"
        with zipfile.ZipFile(wheel) as archive:  # as installers do with a wheel of Python alone
            archive.extractall(site)
        environment = {**os.environ, "PYTHONPATH": str(site)}
        order = [sys.executable, "-W", "ignore", "-c", FIRST_MINUTE]
        done = subprocess.run(order, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == str(site / "effvit" / "__init__.py")
        assert "evit_deit_tiny_patch16_224" in done.stdout


class TestSdist:
    def test_it_holds_what_the_repository_does(self, built: Path) -> None:
        (path,) = built.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert {name for name in tracked.splitlines() if (ROOT / name).is_file()} <= names


class TestEditable:
    @pytest.mark.parametrize(("version", "copies"), [("standard", {"configs": "effvit/configs"}), ("editable", {})])
    def test_wheel_alone_gets_a_copy_of_the_configs(
        self, hatch_build: ModuleType, version: str, copies: dict[str, str]
    ) -> None:
        build_data: dict[str, dict[str, str]] = {"force_include": {}}
        hatch_build.ConfigsInWheel.initialize(SimpleNamespace(), version, build_data)
        assert build_data["force_include"] == copies


class TestReadme:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("https://example.org/effvit/", "[a](https://example.org/effvit/blob/main/docs/a.md#b), ![c]"),
            (None, "a, c"),
        ],
    )
    def test_relative_links_are_made_absolute_or_left_out(
        self, hatch_build: ModuleType, source: str | None, expected: str
    ) -> None:
        text = "[a](docs/a.md#b), ![c](docs/c.svg) [d](https://example.com/d.md) [e](#e)"
        if source is not None:
            expected += "(https://example.org/effvit/raw/main/docs/c.svg)"
        rest = " [d](https://example.com/d.md) [e](#e)"
        assert hatch_build.readable_elsewhere(text, source) == expected + rest
