"""The scenes of `data.scenes` as a data set of mmpretrain, and a sampler that never shows an image twice.

For configs run by tools/train.py and tools/test.py: ``custom_imports = dict(imports=["data.mmpretrain_sets"])``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS
from mmpretrain.registry import DATASETS
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from data.cutouts import CLASSES
from data.scenes import Cutouts
from effvit.schedule import check_count

__all__ = ["CutoutScenes", "FreshSampler"]

Sample = dict[str, Any]  # inputs: (3, H, W) uint8; data_samples: a DataSample with the class


@DATASETS.register_module()
class CutoutScenes(Dataset[Sample]):
    """`data.scenes.Cutouts` in mmpretrain's form.

    Args:
        split: "train" or "test".
        length: Number of images of an epoch.
        data_root: What ``tools/get_data.py`` fetched into; None is its default.
        seed: Of everything that is drawn.
    """

    METAINFO: ClassVar[dict[str, tuple[str, ...]]] = {"classes": CLASSES}

    def __init__(self, split: str, length: int, data_root: str | os.PathLike[str] | None = None, seed: int = 0) -> None:
        self.scenes = Cutouts(split, data_root, length=length, seed=seed)
        self.metainfo = self.METAINFO

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        return [packed(image, label) for image, label in self.scenes.__getitems__(indices)]


def packed(image: Tensor, label: int) -> Sample:
    """An image and its class as mmpretrain's models take them."""
    return {"inputs": image, "data_samples": DataSample().set_gt_label(label)}


@DATA_SAMPLERS.register_module()
class FreshSampler(Sampler[int]):
    """Indices that go on from epoch to epoch, for data sets without an end: epoch e of n images has e n to e n + n - 1.

    The order is that of the indices, so a run that is resumed after an epoch sees what it would have seen. Of several
    processes each takes every so manieth index.

    Args:
        dataset: Its length is the number of images of an epoch.
        first_epoch: Number of the first epoch, for a run that starts from the weights of another one.
        seed: Given by mmengine; nothing is shuffled.
    """

    def __init__(self, dataset: Dataset[Any], first_epoch: int = 0, seed: int | None = None) -> None:
        self.length = len(dataset)  # type: ignore[arg-type]  # mmengine's data sets have one
        self.first_epoch = check_count("first_epoch", first_epoch)
        self.epoch = 0
        self.rank, self.processes = get_dist_info()

    def __iter__(self) -> Iterator[int]:
        begin = (self.first_epoch + self.epoch) * self.length
        return iter(range(begin + self.rank, begin + self.length, self.processes))

    def __len__(self) -> int:
        return len(range(self.rank, self.length, self.processes))

    def set_epoch(self, epoch: int) -> None:
        """Called by mmengine before each epoch, after resuming too."""
        self.epoch = epoch
