"""Labelled images: all layouts give the same ones, labels mean a model's classes, bad sets are refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from labelled_sets import SYNSETS, drawn, jpeg, write_devkit, write_fashion, write_folders, write_handed_out, write_tar
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import nn
from torchvision.datasets import ImageFolder

from effvit.data import imagenet
from effvit.data.classes import model_labels
from effvit.data.labelled import LabelledImages, digest, readable, spread
from effvit.data.opening import open_labelled, open_unlabelled
from effvit.data.preparation import image_transform
from effvit.images import open_image


class Classifier(nn.Module):
    """What the labels ask of a model."""

    def __init__(self, num_classes: int, label_names: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"label_names": label_names}


def labels(images: LabelledImages, classes: int, *names: str) -> list[int]:
    return model_labels(images, Classifier(classes, names or None), "model")


class TestLayouts:
    def test_folders_are_read_as_torchvision_does(self, tmp_path: Path) -> None:
        folder = write_folders(tmp_path / "val", ("b", "a10", "a9"))
        expected = ImageFolder(str(folder), loader=open_image)
        images = open_labelled(folder)
        assert labels(images, 3) == expected.targets
        for index, (image, _) in enumerate(expected):
            assert images.read(index).tobytes() == image.tobytes()

    def test_archive_as_handed_out_gets_its_classes_of_the_devkit(self, tmp_path: Path) -> None:
        """The order of classes is what ``write_handed_out`` wrote into ground truth and meta.mat."""
        images = open_labelled(write_handed_out(tmp_path))
        assert images.labels == [SYNSETS[i] for i in (2, 0, 1, 1, 0, 2)]
        assert labels(images, 1000) == [217, 0, 1, 1, 0, 217]
        readable(images, range(6))
        assert images.read(3).size == (40, 32)

    def test_archive_and_folder_have_the_same_images(self, tmp_path: Path) -> None:
        folder = write_folders(tmp_path / "val")
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))}
        images, archived = open_labelled(folder), open_labelled(write_tar(tmp_path / "val.tar", files))
        assert [Path(name).name for name in archived.names] == [Path(name).name for name in images.names]
        assert archived.labels == images.labels
        for index in range(len(images)):
            assert archived.read(index).tobytes() == images.read(index).tobytes()

    def test_archive_of_archives_is_read_where_it_stands(self, tmp_path: Path) -> None:
        """The layout of ILSVRC's training set: a .tar for each class inside of one."""
        inner = {
            f"{name}.tar": write_tar(tmp_path / f"{name}.tar", {f"{name}_1.JPEG": jpeg(i)}).read_bytes()
            for i, name in enumerate(SYNSETS)
        }
        images = open_labelled(write_tar(tmp_path / "all" / "train.tar", inner))
        assert images.labels == list(SYNSETS)
        first = tmp_path / "first.JPEG"
        first.write_bytes(jpeg(0))
        assert images.read(0).tobytes() == open_image(first).tobytes()
        readable(images, range(3))

    def test_flat_folder_beside_the_devkit_is_read_too(self, tmp_path: Path) -> None:
        write_handed_out(tmp_path)
        (tmp_path / "val").mkdir()
        for number in (2, 5):
            (tmp_path / "val" / f"ILSVRC2012_val_{number:08}.JPEG").write_bytes(jpeg(number))
        assert open_labelled(tmp_path / "val").labels == [SYNSETS[0], SYNSETS[0]]

    @pytest.mark.parametrize(("first", "second"), [("2", "0"), ("b", "a")])
    def test_table_has_numbers_or_names(self, tmp_path: Path, first: str, second: str) -> None:
        drawn(1).save(tmp_path / "one.png")
        (tmp_path / "of" / "all").mkdir(parents=True)
        drawn(2).save(tmp_path / "of" / "all" / "two.png")
        table = tmp_path / "table.csv"
        table.write_text(f"label,note,path\n{first},x,one.png\n{second},y,of/all/two.png\n")
        images = open_labelled(table)
        assert images.read(1).tobytes() == drawn(2).tobytes()
        assert labels(images, 3, "a", "other", "b") == [2, 0]

    def test_idx_files_are_read_with_their_labels(self, tmp_path: Path) -> None:
        """The format of MNIST: big-endian magic number and sizes, then bytes (LeCun's page, torchvision reads it)."""
        pixels = np.arange(2 * 3 * 4, dtype=np.uint8)
        header = np.array([0x803, 2, 3, 4], ">i4").tobytes()
        (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(np.array([0x801, 2], ">i4").tobytes() + bytes([7, 1]))
        images = open_labelled(tmp_path / "t10k-images-idx3-ubyte")
        assert labels(images, 10) == [7, 1]
        assert np.asarray(images.read(1)).tolist() == pixels[12:].reshape(3, 4).tolist()

    def test_unlabelled_images_are_found_at_any_depth(self, tmp_path: Path) -> None:
        write_folders(tmp_path / "deep" / "er", ("a",), each=1)
        drawn(9).save(tmp_path / "loose.png")
        (tmp_path / "notes.txt").write_text("no image")
        assert [Path(name).name for name in open_unlabelled(tmp_path).names] == [
            "ILSVRC2012_val_00000001.JPEG",
            "loose.png",
        ]


class TestPreparation:
    @pytest.mark.parametrize(
        "name", ["deit_small_patch16_224", "vit_small_patch16_384", "eva02_tiny_patch14_336", "vit_nano_patch4_28"]
    )
    def test_images_are_prepared_as_timm_validates(self, name: str) -> None:
        """As validate.py of timm: its data configuration at test size, its transform, the image in timm's mode."""
        model = timm.create_model(name, num_classes=0, embed_dim=24 if "nano" not in name else 96, depth=1, num_heads=3)
        config = resolve_data_config({}, model=model, use_test_size=True)
        expected = create_transform(**config, is_training=False)
        image = drawn(3).resize((300, 260))
        timms = image.convert("L" if config["input_size"][0] == 1 else "RGB")
        assert torch.equal(image_transform(model)(image), expected(timms))


class TestClasses:
    def test_folder_with_some_of_imagenets_classes_maps_to_their_numbers(self, tmp_path: Path) -> None:
        images = open_labelled(write_folders(tmp_path, each=1))
        known = ImageNetInfo().label_names()
        assert labels(images, 1000) == [known.index(name) for name in SYNSETS] == [0, 1, 217]

    def test_models_own_names_of_classes_come_first(self, tmp_path: Path) -> None:
        images = open_labelled(write_folders(tmp_path, ("cat", "dog"), each=1))
        assert labels(images, 3, "dog", "horse", "cat") == [2, 0]

    def test_as_many_folders_as_classes_are_numbered_in_their_order(self, tmp_path: Path) -> None:
        assert labels(open_labelled(write_folders(tmp_path, ("x", "y"), each=1)), 2) == [0, 1]

    @pytest.mark.parametrize(
        ("names", "classes", "own", "message"),
        [
            (("cat", "cow", "dog"), 1000, (), r"has 3 classes \(cat, cow, dog\), but model has 1000; .*WordNet ids"),
            (SYNSETS, 10, (), "has 3 classes .*, but model has 10"),
            (("n01440764", "n99999999"), 1000, (), "must be those of imagenet-1k.*the first is 'n99999999'; rename"),
            (("cat", "cow"), 2, ("dog", "cat"), "must be the classes that model names.*1 of 2.*the first is 'cow'"),
            (("cat",), 0, (), "needs a classifier, but model has num_classes=0"),
        ],
    )
    def test_foreign_classes_are_named(
        self, tmp_path: Path, names: tuple[str, ...], classes: int, own: tuple[str, ...], message: str
    ) -> None:
        images = open_labelled(write_folders(tmp_path, names, each=1))
        with pytest.raises(ValueError, match=message):
            labels(images, classes, *own)

    def test_label_outside_of_the_classes_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "table.csv").write_text("path,label\na.png,9\nb.png,10\n")
        with pytest.raises(ValueError, match=r"labels must be 0 to 9, .* but 1 of 2 .* the first is 10 of b\.png"):
            labels(open_labelled(tmp_path / "table.csv"), 10)


class TestBadInput:
    def test_missing_path_is_named_with_the_layouts(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no folder or file .*none; labelled images are a folder"):
            open_labelled(tmp_path / "none")

    def test_empty_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is empty; labelled images are a folder with one folder for each class"):
            open_labelled(tmp_path)
        with pytest.raises(ValueError, match="holds no images"):
            open_unlabelled(tmp_path)

    def test_class_without_images_is_named(self, tmp_path: Path) -> None:
        write_folders(tmp_path, ("a", "b"))
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="for the classes empty"):
            open_labelled(tmp_path)

    def test_images_outside_of_class_folders_are_named(self, tmp_path: Path) -> None:
        drawn(1).save(tmp_path / "x.png")
        with pytest.raises(ValueError, match=r"1 pictures lie in it \(x\.png \.\.\.\); sort them"):
            open_labelled(tmp_path)

    def test_unreadable_images_are_counted_and_named(self, tmp_path: Path) -> None:
        folder = write_folders(tmp_path / "val", each=3)
        paths = sorted(folder.rglob("*.JPEG"))
        paths[1].write_bytes(paths[1].read_bytes()[:-600])  # cut off
        paths[4].write_text("no image")
        paths[6].write_bytes(b"")
        with pytest.raises(ValueError, match=r"3 of 9 images of .*; mend them, .* --skip-bad: .*00000002\.JPEG"):
            readable(open_labelled(folder), range(9))

    def test_unreadable_member_of_an_archive_is_named(self, tmp_path: Path) -> None:
        archive = write_tar(tmp_path / "val.tar", {"a/1.JPEG": jpeg(1), "b/2.JPEG": jpeg(2)[:-500]})
        with pytest.raises(ValueError, match=r"1 of 2 images of .*val\.tar: b/2\.JPEG cannot be read"):
            readable(open_labelled(archive), range(2))

    def test_archive_with_an_image_outside_of_folders_is_refused(self, tmp_path: Path) -> None:
        archive = write_tar(tmp_path / "val.tar", {"a/1.JPEG": jpeg(1), "2.JPEG": jpeg(2)})
        with pytest.raises(ValueError, match=r"holds 2\.JPEG outside any folder"):
            open_labelled(archive)

    def test_archive_that_is_none_and_one_without_images_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar").write_text("x" * 2000)
        with pytest.raises(ValueError, match=r"a\.tar cannot be read as an uncompressed \.tar"):
            open_labelled(tmp_path / "a.tar")
        with pytest.raises(ValueError, match=r"b\.tar holds no images"):
            open_labelled(write_tar(tmp_path / "b.tar", {"a.txt": b"x"}))

    def test_archive_without_the_devkit_names_it(self, tmp_path: Path) -> None:
        write_handed_out(tmp_path)
        (tmp_path / imagenet.DEVKIT).unlink()
        with pytest.raises(FileNotFoundError, match=rf"stand in {re.escape(imagenet.DEVKIT)}, which is neither in"):
            open_labelled(tmp_path)

    def test_devkit_of_another_set_is_refused(self, tmp_path: Path) -> None:
        write_handed_out(tmp_path)
        write_devkit(tmp_path, [1, 2], {1: SYNSETS[0], 2: SYNSETS[1]})
        with pytest.raises(ValueError, match="has classes for the images 1 to 2, not for 6"):
            open_labelled(tmp_path)
        write_devkit(tmp_path, [7], {1: SYNSETS[0], 2: SYNSETS[1]})
        with pytest.raises(ValueError, match=r"cannot be read as the devkit of ILSVRC 2012 \(KeyError\(7\)\)"):
            open_labelled(tmp_path)

    def test_missing_scipy_is_named_with_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_handed_out(tmp_path)
        monkeypatch.setattr("effvit.data.imagenet.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"SciPy, which is not installed; install effvit\[imagenet\]"):
            open_labelled(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "file,class\na.png,1\n",
                r"must begin with a line that names .* path and label, got 'file,class'",
            ),
            ("path,label\n", "lists no images"),
            ("path,label\na.png,1\nb.png\n", r"line 3 of .*table\.csv lacks a path or a label"),
        ],
    )
    def test_table_of_another_form_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "table.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_labelled(tmp_path / "table.csv")

    def test_idx_without_labels_or_of_another_form_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "t10k-images-idx3-ubyte"
        path.write_bytes(b"1234")
        with pytest.raises(FileNotFoundError, match=r"there is no file .*t10k-labels-idx1-ubyte"):
            open_labelled(path)
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"1234")
        with pytest.raises(ValueError, match="are no IDX files"):
            open_labelled(path)

    def test_other_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "set.zip").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"set\.zip is no set of labelled images; those are"):
            open_labelled(tmp_path / "set.zip")


class TestSelection:
    def test_images_are_spread_evenly(self) -> None:
        assert spread(10, 4, "set") == [0, 2, 5, 7]
        assert spread(3, 3, "set") == [0, 1, 2]

    @pytest.mark.parametrize("number", [0, -1, 4])
    def test_more_images_than_there_are_cannot_be_taken(self, number: int) -> None:
        with pytest.raises(ValueError, match=f"set has 3 images, cannot take {number} of them; ask for 1 to 3"):
            spread(3, number, "set")

    def test_digest_changes_with_name_size_label_and_order(self, tmp_path: Path) -> None:
        images = open_labelled(write_fashion(tmp_path / "ten"))
        before = digest(images, range(60))
        assert digest(open_labelled(tmp_path / "ten"), range(60)) == before
        assert digest(images, range(59)) != before
        assert digest(images, reversed(range(60))) != before
        (tmp_path / "ten" / "0" / "t-shirt-0.png").write_bytes(b"another size")
        assert digest(open_labelled(tmp_path / "ten"), range(60)) != before
