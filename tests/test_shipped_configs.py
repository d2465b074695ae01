"""Configs of the package are found, listed and copied wherever it is installed; a copy means what the original does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import effvit
from effvit.cli import main
from effvit.dense.shipped_configs import config_folder, copy_config, find_config, list_configs

ROOT = Path(__file__).resolve().parents[1]
NANO = "mmdet/garments/mask-rcnn_evit-nano.py"  # its base has a base in another folder
NAMES = [config.name for config in list_configs()]


class TestPlace:
    def test_checkout_has_them_beside_the_package(self) -> None:
        assert config_folder() == ROOT / "configs"

    def test_wheel_has_them_in_the_package(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        shutil.copytree(ROOT / "configs", tmp_path / "effvit" / "configs")
        monkeypatch.setattr(effvit, "__file__", str(tmp_path / "effvit" / "__init__.py"))
        assert config_folder() == tmp_path / "effvit" / "configs"
        assert [config.name for config in list_configs()] == NAMES

    def test_installation_without_them_is_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "configs").mkdir()  # another project's
        monkeypatch.setattr(effvit, "__file__", str(tmp_path / "effvit" / "__init__.py"))
        with pytest.raises(FileNotFoundError, match=r"effvit was installed without its configs; install effvit from a"):
            config_folder()


class TestList:
    def test_all_but_bases_are_listed(self) -> None:
        files = [path for path in (ROOT / "configs").rglob("*.py") if "_base_" not in path.parts]
        assert sorted(path.relative_to(ROOT / "configs").as_posix() for path in files) == NAMES

    def test_each_has_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The first sentence of the comment in the file."""
        assert main(["configs", "list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == NAMES
        (line,) = (line for line in lines if line.startswith("mmdet/garments/mask-rcnn_vit-nano.py"))
        assert line.endswith("\tDense: the ViT whose weights come with the package, fine-tuned")

    def test_pattern_selects(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["configs", "list", "mmseg/*segmenter*"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 5

    def test_pattern_without_match_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["configs", "list", "yolo*"]) == 2
        assert "no config matches 'yolo*'; `effvit configs list` prints all names" in capsys.readouterr().err

    def test_those_that_need_a_checkout_are_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        """custom_imports of any other module than the package's and OpenMMLab's, in the config or inherited."""
        needing = {config.name: config.outside for config in list_configs() if config.outside}
        cutouts = [name for name in NAMES if name.startswith("mmpretrain/cutouts/")]
        assert "mmpretrain/cutouts/finetune-cutouts_tome.py" in cutouts
        assert needing == dict.fromkeys(cutouts, ("data.mmpretrain_sets",))
        assert main(["configs", "list", cutouts[-1]]) == 0
        assert "[imports data.mmpretrain_sets of a checkout's tools/]" in capsys.readouterr().out


class TestCopy:
    @pytest.mark.parametrize("name", NAMES)
    def test_copy_has_every_base_it_names(self, name: str, tmp_path: Path) -> None:
        copies = copy_config(name, tmp_path)
        assert copies[0] == tmp_path / name
        assert sorted(copies) == sorted(path for path in tmp_path.rglob("*") if path.is_file())
        for copy in copies:
            text = copy.read_text()
            assert text == (ROOT / "configs" / copy.relative_to(tmp_path)).read_text()
            bases = re.search(r'^_base_ = (\[[^]]*\]|"[^"]*")', text, re.MULTILINE)
            named = re.findall(r'"([^"]+)"', bases[1]) if bases else []
            assert all("::" in base or (copy.parent / base).is_file() for base in named)

    def test_copy_means_what_the_original_means(self, tmp_path: Path) -> None:
        pytest.importorskip("mmdet", reason="the mm extra is not installed")
        from effvit.dense.openmmlab import load_config

        assert load_config(copy_config(NANO, tmp_path)[0]).to_dict() == load_config(find_config(NANO)).to_dict()

    def test_copied_files_are_printed_the_config_first(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["configs", "copy", NANO, str(tmp_path / "mine")]) == 0
        bases = ("mmdet/garments/_base_/mask-rcnn_garments.py", "mmdet/composites/_base_/mask-rcnn_composites.py")
        assert capsys.readouterr().out.splitlines() == [str(tmp_path / "mine" / name) for name in (NANO, *bases)]

    def test_changed_file_is_not_overwritten_and_nothing_is_written(self, tmp_path: Path) -> None:
        base = tmp_path / "mmdet" / "garments" / "_base_" / "mask-rcnn_garments.py"
        base.parent.mkdir(parents=True)
        base.write_text("mine = 1\n")
        with pytest.raises(FileExistsError, match=r"mask-rcnn_garments\.py differs .* not overwritten; give another"):
            copy_config(NANO, tmp_path)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [base]
        assert base.read_text() == "mine = 1\n"

    def test_folder_in_the_place_of_a_file_is_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / NANO).mkdir(parents=True)
        with pytest.raises(FileExistsError, match=r"mask-rcnn_evit-nano\.py differs"):
            copy_config(NANO, tmp_path)

    def test_configs_with_bases_in_common_share_a_folder(self, tmp_path: Path) -> None:
        first = copy_config(NANO, tmp_path)
        second = copy_config(NANO.replace("evit", "tome"), tmp_path)
        assert set(first[1:]) < set(second)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("mask-rcnn_evit-nano", r"did you mean mmdet/garments/mask-rcnn_evit-nano\.py\?"),
            ("mmdet/garments/mask-rcnn_evti-nano.py", r"did you mean mmdet/garments/mask-rcnn_evit-nano\.py"),
            ("../README.md", "`effvit configs list` prints all names"),
        ],
    )
    def test_unknown_name_is_refused_with_near_ones(self, name: str, hint: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=rf"effvit has no config '{re.escape(name)}'; {hint}"):
            copy_config(name, tmp_path)
