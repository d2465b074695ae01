"""Image files as 8-bit RGB: the one place of the package that opens them, and the rule by which pixels are read.

- Upright: the turn or mirroring that EXIF asks for is applied. Where annotations belong to the image, it is applied
  only if they are made for the upright size (``open_image``, argument ``size``).
- 16-bit integers: 0 to 65535 become 0 to 255, whatever the image's own least and largest value. Integers of 32 bits
  have no usual range and are refused.
- Floats: values within 0 to 1 are multiplied by 255; other values within 0 to 255 are taken as they are; all others are
  stretched so that the least becomes 0 and the largest 255. NaN and infinity are refused.
- Transparency (alpha channels, transparent palette entries): composited over white.
- Palettes, 1 bit, grey, CMYK and YCbCr: Pillow's conversion. Of several frames the first is read.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["as_rgb", "check_whole", "fit_size", "open_image", "opened", "turned_size"]

Pixels: TypeAlias = NDArray[np.float32 | np.float64]

BACKGROUND = (255, 255, 255)
EXIF_ORIENTATION = 0x0112
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
TAIL = 64  # bytes at the end of a file that hold the mark; some writers pad
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")  # and "I" of PNG and PPM in older Pillows


@contextmanager
def opened(path: str | os.PathLike[str], file: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """The image in a file, its header read; errors of opening it, and of decoding it in the body, name the file.

    Args:
        path: The file, or what errors call ``file``.
        file: Opened already, such as a member of an archive; None means that ``path`` is opened.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A folder, a pipe or device, a link to itself, an empty file, no image, an image that is cut off or
            broken, or one of more pixels than Pillow decodes (``2 * PIL.Image.MAX_IMAGE_PIXELS``).
    """
    if file is None:
        check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # up to the limit is fine
            with Image.open(path if file is None else file) as image:
                yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image of a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} has more pixels than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} that are decoded; make it smaller"
        ) from error
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into memory; make it smaller") from error
    except Exception as error:  # decoders fail with SyntaxError, struct.error, EOFError, zlib.error and others
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        remedy = "" if isinstance(error, ValueError) else "; write or fetch it again"  # ours bring theirs along
        raise ValueError(f"{path} cannot be read as an image: {str(error) or type(error).__name__}{remedy}") from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise the error of ``opened`` unless the path is that of a file with content; opening a pipe would block."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason: str = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path} cannot be opened: {reason}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is a folder; name the images in it")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a pipe, socket or device, not a file; write the image to a file")
    if status.st_size == 0:
        raise ValueError(f"{path} is empty; write or fetch it again")


def open_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Image.Image:
    """The image in a file in RGB, by the rule of this module.

    Args:
        path: The file.
        size: (height, width) that annotations of the image are made for; None means upright.

    Raises:
        FileNotFoundError, ValueError: As ``opened``, or an image of another size.
    """
    with opened(path) as image:
        if size is not None and not fit_size(image, size, path):
            image.getexif().pop(EXIF_ORIENTATION, None)
        return as_rgb(image)


def check_whole(image: Image.Image, path: str | os.PathLike[str], file: IO[bytes] | None = None) -> None:
    """Decode an opened image whose file lacks the end of its format; the error of one that is cut off is Pillow's.

    Args:
        image, path, file: As ``opened`` gave and took them.
    """
    end = END_MARKS.get(image.format or "")
    with open(path, "rb") if file is None else nullcontext(file) as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
        if end is None or end not in stream.read():
            image.load()


def turned_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of the image once it is upright; nothing is decoded."""
    width, height = image.size
    return (width, height) if image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS else (height, width)


def fit_size(image: Image.Image, size: tuple[int, int], path: str | os.PathLike[str]) -> bool:
    """Whether annotations of that (height, width) belong to the upright image; else to its rows as they are stored.

    Raises:
        ValueError: They belong to neither.
    """
    if turned_size(image) == size:
        return True
    if image.size == size[::-1]:
        return False
    raise ValueError(
        f"{path} is {image.height} x {image.width} pixels, but its annotations are made for {size[0]} x {size[1]}; "
        "correct the size in the annotations, or bring back the image that was annotated"
    )


def as_rgb(image: Image.Image) -> Image.Image:
    """The image upright in 8-bit RGB, by the rule of this module.

    Raises:
        ValueError: Pixels without a usual range: NaN, infinity, or 32-bit integers.
    """
    has_sixteen_bits = image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if has_sixteen_bits:
        return from_array(np.asarray(image, np.float64) / 257)
    if image.mode == "I":
        raise ValueError("its pixels are integers of 32 bits, which have no usual range; save it with 8 or 16 bits")
    if image.mode == "F":
        floats: NDArray[np.float32] = np.asarray(image)
        return from_array(scaled_floats(floats))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, BACKGROUND)
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def scaled_floats(values: Pixels) -> Pixels:
    """Float pixels on the scale from 0 to 255."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low + high):
        raise ValueError("its float pixels contain NaN or infinity; replace them by values")
    if low >= 0 and high <= 1:
        return 255 * values
    if low >= 0 and high <= 255:
        return values
    if low == high:
        raise ValueError(f"its float pixels are all {low:g}, outside 0 to 255, which has no reading; scale them")
    return (values.astype(np.float64) - low) * (255 / (high - low))


def from_array(values: Pixels) -> Image.Image:
    """An RGB image of grey values (H, W) from 0 to 255."""
    return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
