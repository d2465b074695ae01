"""What is checked of an image while mmdet and mmseg load it: that its annotations are made for its size.

`effvit.dense.data_checks` puts the transforms into the pipelines of a config. Where there are no annotations, as in the
inference of both, they do nothing.
"""

from __future__ import annotations

from typing import TypedDict

import mmcv
import numpy as np
import numpy.typing as npt
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from effvit.dense.label_maps import IGNORED
from effvit.images import opened
from effvit.protocols import Size

__all__ = ["CheckLabels", "MatchAnnotations", "Results"]


class Results(TypedDict, total=False):
    """What mmcv's transforms hand on of one image, as far as it is read or changed here."""

    img: npt.NDArray[np.uint8]
    img_path: str
    img_shape: Size
    ori_shape: Size
    height: int
    width: int
    seg_map_path: str | None
    gt_seg_map: npt.NDArray[np.int64]


@TRANSFORMS.register_module()
class MatchAnnotations(BaseTransform):
    """After LoadImageFromFile: turn an image as its annotations are.

    mmcv turns images as EXIF says. Where height and width of the annotations, or of the label map, are those of the
    image before the turn, the image is read again without it.

    Args:
        color_type: As of LoadImageFromFile.
        imdecode_backend: As of LoadImageFromFile.
    """

    def __init__(self, color_type: str = "color", imdecode_backend: str = "cv2") -> None:
        self.color_type, self.imdecode_backend = color_type, imdecode_backend

    def transform(self, results: Results) -> Results:
        """Change img, img_shape and ori_shape where need be; a ValueError for annotations of neither size."""
        size = annotated_size(results)
        if size is None or results["img"].shape[:2] == size:
            return results
        path, image = results["img_path"], results["img"]
        flag = f"{self.color_type}_ignore_orientation"
        stored: npt.NDArray[np.uint8] = mmcv.imread(path, flag=flag, backend=self.imdecode_backend)
        if stored.shape[:2] != size:
            raise ValueError(
                f"{path} is {image.shape[0]} x {image.shape[1]} pixels, but its annotations are made for {size[0]} x "
                f"{size[1]}; correct the size in the annotations, or bring back the image that was annotated"
            )
        results["img"] = stored.astype(image.dtype)
        results["img_shape"] = results["ori_shape"] = size
        return results


def annotated_size(results: Results) -> Size | None:
    """(height, width) that the annotations of an image are made for; None where it has none."""
    if "height" in results and "width" in results:
        return results["height"], results["width"]
    path = results.get("seg_map_path")
    if path is None:
        return None
    with opened(path) as labels:
        return labels.height, labels.width


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """After LoadAnnotations of mmseg: raise a ValueError for a label that no class has.

    Args:
        num_classes: Classes of the data set.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def transform(self, results: Results) -> Results:
        """The results as they are."""
        labels = results.get("gt_seg_map")
        if labels is None:
            return results
        if labels.ndim != 2:
            raise ValueError(f"{results['seg_map_path']} has colours, not one label a pixel; save it with one channel")
        wrong = labels[(labels >= self.num_classes) & (labels != IGNORED)]
        if wrong.size:
            raise ValueError(
                f"{results['seg_map_path']} has the label {int(np.min(wrong))} (as loaded), but there are "
                f"{self.num_classes} classes, and {IGNORED} is ignored; correct the label map"
            )
        return results
