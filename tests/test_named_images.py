"""Images as a command line names them; which files a shell would have listed is the expectation."""

from __future__ import annotations

import io
import os
from pathlib import Path, PurePath

import pytest
from PIL import Image

from effvit.data.labelled import readable
from effvit.show import named_images
from effvit.show.named_images import find_images, told_apart


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png, b.jpg, notes.txt and, one folder deeper, a.png and C.JPEG; each image of its own grey."""
    (tmp_path / "sub").mkdir()
    for grey, name in enumerate(("a.png", "b.jpg", "sub/a.png", "sub/C.JPEG")):
        Image.new("L", (8, 6), 10 * grey).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


class TestForms:
    def test_a_folder_is_the_images_in_it_and_below_it(self, folder: Path) -> None:
        found = find_images([str(folder)])
        assert found.names == [f"{folder.name}/a.png", "b", "C", "sub/a.png"]
        assert [image.getpixel((0, 0)) for image in find_images([str(folder / "sub")])] == [(30, 30, 30), (20, 20, 20)]

    def test_a_pattern_is_what_a_shell_makes_of_it(self, folder: Path) -> None:
        assert find_images([f"{folder}/*.[pj][np]g"]).names == ["a", "b"]
        assert find_images([f"{folder}/**/*.png"]).names == [f"{folder.name}/a.png", "sub/a.png"]
        assert len(find_images([f"{folder}/s*"])) == 2  # the folder
        assert len(find_images([f"{folder}/**/*[!t]"])) == 4  # a folder and the files in it are one set

    def test_a_file_whose_name_is_a_pattern_is_a_file(self, folder: Path) -> None:
        Image.new("L", (5, 4), 9).save(folder / "[ab].png")
        assert find_images([f"{folder}/[ab].png"]).names == ["[ab]"]

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\0"])
    def test_a_list_comes_from_stdin(self, folder: Path, end: str) -> None:
        """As find prints it, with -print0 too; names in it are no patterns."""
        Image.new("L", (5, 4), 9).save(folder / "[ab].png")
        listed = io.BytesIO(os.fsencode(end.join([f"{folder}/b.jpg", f"{folder}/[ab].png", str(folder / "sub"), ""])))
        assert find_images(["-"], listed).names == ["b", "[ab]", "C", "a"]

    def test_installed_images_have_names(self) -> None:
        found = find_images(["fashion_mnist:sneaker-*", "cutouts:cl*"])
        assert found.names == [*(f"sneaker-{row}" for row in range(6)), "clock"]
        assert {image.mode for image in found} == {"RGB"}
        assert len(find_images(["fashion_mnist:*"])) == 60
        assert find_images(["photographs:co*"]).names == ["coffee"]

    def test_a_colon_makes_no_kind(self, tmp_path: Path) -> None:
        Image.new("L", (5, 4), 9).save(tmp_path / "grey:1.png")
        found = find_images([str(tmp_path / "grey:1.png")])
        assert (found.names, [image.size for image in found]) == (["grey:1"], [(5, 4)])


class TestErrors:
    def test_what_names_no_image_is_refused_with_a_remedy(self, folder: Path) -> None:
        (folder / "empty").mkdir()
        for text, message in {
            f"{folder}/*.gif": r"no file matches .*/\*\.gif",
            f"{folder}/empty": r"empty holds no images \(\.jpg, .*\); name a folder that does",
            "-": "- reads a list of images from stdin, one a line, but none came; pipe one in, e.g. from find",
            "cutouts:dog": r"cutouts:dog names no image; cutouts: has t-shirt-top, trouser",
        }.items():
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                find_images([text], io.BytesIO())

    def test_an_image_named_twice_is_refused(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"sub/a\.png is named more than once; name every image once"):
            find_images([str(folder / "sub"), f"{folder}/sub/../sub/a.png"])

    def test_a_missing_file_is_a_bad_image(self, folder: Path) -> None:
        found = find_images([f"{folder}/a.png", f"{folder}/none.png"])
        assert len(found) == 2
        with pytest.raises(ValueError, match=r"1 of 2 images cannot be read; mend them, .*: there is no file .*none"):
            readable(found, range(2))
        with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.png$"):
            readable(find_images([f"{folder}/none.png"]), [0])


class TestReading:
    def test_nothing_is_decoded_before_its_turn(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[str] = []

        def open_image(path: Path) -> Image.Image:
            opened.append(path.name)
            return Image.new("RGB", (1, 1))

        monkeypatch.setattr(named_images, "open_image", open_image)
        images = iter(find_images([f"{folder}/*.[pj][np]g"]))
        assert opened == []
        next(images)
        assert opened == ["a.png"]

    def test_bad_ones_are_left_out_and_told(self, folder: Path) -> None:
        """One is cut off; the other has its header and end, so that only decoding finds the fault."""
        whole = (folder / "sub" / "a.png").read_bytes()
        (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
        broken = bytearray(whole)
        broken[whole.index(b"IDAT") + 6] ^= 255
        (folder / "sub" / "a.png").write_bytes(broken)
        found, told = find_images([str(folder)]), []
        kept = readable(found, range(len(found)), skip_bad=True, on_bad=lambda error: told.append(str(error)))
        assert sorted(PurePath(source.path).name for source in found.only(kept).sources) == ["C.JPEG", "a.png", "b.jpg"]
        assert ["cut.png" in told[0], "sub/a.png" in told[1], len(told)] == [True, True, 2]

    def test_none_left_is_an_error(self, folder: Path) -> None:
        for name in ("1.png", "2.png", "3.png", "4.png", "5.png"):
            (folder / "sub" / name).touch()
        bad = find_images([f"{folder}/sub/[1-5].png"])
        with pytest.raises(ValueError, match=r"5 of 5 images cannot be read: .*1\.png is empty.*3\.png.*; and 2 more"):
            readable(bad, range(5), skip_bad=True)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/p/a.png", "/p/b.png"], ["a", "b"]),
        (["/p/a.png", "/q/a.png"], ["p/a.png", "q/a.png"]),
        (["/p/a.png", "/p/a.jpg"], ["a.png", "a.jpg"]),
        (["/p/x/a.png", "/q/x/a.png"], ["p/x/a.png", "q/x/a.png"]),
        (["/p/a.png.png", "/q/a.png", "/r/a.jpg"], ["a.png", "q/a.png", "a.jpg"]),
        (["photographs/coffee", "/photographs/coffee"], ["photographs/coffee", "/photographs/coffee"]),
    ],
)
def test_names_are_as_short_as_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert told_apart([PurePath(path) for path in paths]) == names
