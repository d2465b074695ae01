"""Images as commands are asked for them: found, looked at before anything is measured, bad ones left out if asked."""

from __future__ import annotations

from collections.abc import Sequence

from effvit.cli.output import progress, say
from effvit.data.labelled import StoredImages, readable
from effvit.messages import one_line
from effvit.show.named_images import NamedImages, find_images

__all__ = ["look_at", "named_images"]


def named_images(texts: Sequence[str], skip_bad: bool) -> NamedImages:
    """The images that arguments name, those that can be read; errors as of ``find_images`` and ``readable``."""
    found = find_images(texts)
    return found.only(look_at(found, range(len(found)), skip_bad))


def look_at(images: StoredImages, indices: Sequence[int], skip_bad: bool) -> list[int]:
    """Those of the images that can be read, with progress; bad ones that are left out are named and counted.

    Raises:
        ValueError, OSError: As ``effvit.data.labelled.readable``.
    """
    with progress() as bars:
        bar = bars.add("looking at images", len(indices))
        found = readable(
            images,
            indices,
            skip_bad=skip_bad,
            on_image=bar.advance,
            on_bad=lambda error: say(f"left out: {one_line(error)}"),
        )
    if len(found) < len(indices):
        say(f"{len(indices) - len(found)} of {len(indices)} images left out")
    return found
