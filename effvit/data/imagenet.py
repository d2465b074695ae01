"""The validation set of ILSVRC 2012 as it is handed out: flat file names, whose classes stand in the devkit."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from effvit.messages import plain

__all__ = ["DEVKIT", "IMAGES", "are_flat", "labels_of"]

IMAGES, DEVKIT = "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
FLAT = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")
META = "ILSVRC2012_devkit_t12/data/meta.mat"
TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


def are_flat(names: Sequence[str]) -> bool:
    """Whether all are names of the validation set as it is handed out, outside of folders for classes."""
    return all(FLAT.fullmatch(name) and not Path(name).parent.name.startswith("n") for name in names)


def labels_of(names: Sequence[str], folder: Path) -> list[str]:
    """The WordNet id of each image of the validation set, by the number in its name.

    Args:
        names: As ``are_flat`` takes them.
        folder: Where the devkit lies, or its parent does.

    Raises:
        FileNotFoundError: There is no devkit.
        ValueError: It cannot be read, or has no class for one of the images.
    """
    devkit = next((place / DEVKIT for place in (folder, folder.parent) if (place / DEVKIT).is_file()), None)
    if devkit is None:
        raise FileNotFoundError(
            f"the classes of {plain(names[0])} and {len(names) - 1} others stand in {DEVKIT}, which is neither in "
            f"{plain(folder)} nor in the folder above; put it there, or sort the images into folders by WordNet ids"
        )
    truth = read_devkit(devkit)
    numbers = [int(FLAT.fullmatch(name)[1]) for name in names]  # type: ignore[index]  # are_flat
    if not 0 < min(numbers) <= max(numbers) <= len(truth):
        raise ValueError(f"{plain(devkit)} has classes for the images 1 to {len(truth)}, not for {max(numbers)}")
    return [truth[number - 1] for number in numbers]


def read_devkit(path: Path) -> list[str]:
    """The WordNet ids of the validation images in the order of their numbers.

    The ground truth gives ILSVRC2012_ID of each image, the first field of the records of meta.mat; the second is the
    WordNet id (readme.txt of the devkit). Like torchvision's ImageNet this reads meta.mat with SciPy.

    Raises:
        ValueError: SciPy is not installed, or the archive does not hold what it should.
    """
    if find_spec("scipy") is None:
        raise ValueError(f"{plain(path)} is read with SciPy, which is not installed; install effvit[imagenet]")
    import numpy as np
    from scipy.io import loadmat

    try:
        with tarfile.open(path) as archive:
            meta, truth = _content(archive, META), _content(archive, TRUTH)
        records: Any = np.atleast_1d(loadmat(BytesIO(meta), squeeze_me=True)["synsets"])
        known = {int(record[0]): str(record[1]) for record in records}
        return [known[int(line)] for line in truth.split()]
    except Exception as error:  # of tarfile, zlib, SciPy and of our own look-ups
        raise ValueError(
            f"{plain(path)} cannot be read as the devkit of ILSVRC 2012 ({error!r}); fetch it again"
        ) from error


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file")
    with file:
        return file.read()
