"""Every config builds the model and the optimizer it ships, for images of any size, and trains a step.

Nothing of a config is changed but ``pretrained``: no test needs the network. The small ones of each kind train here,
all of them in a run with ``-m release``. Configs without an optimizer evaluate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from math import ceil, cos, pi, prod
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="the mm extra is not installed")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from data.cutouts import CLASSES
from data.garments import GARMENTS
from hosts import released
from mmcv.image import rescale_size
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.structures import PixelData
from mmpretrain.registry import MODELS as CLASSIFIERS
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import nn

from effvit.dense.channels import check_channels
from effvit.dense.openmmlab import load_config
from effvit.dense.runner import without_pretrained
from effvit.hosts.host import ReducedHost

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if "_base_" not in path.parts)
SIDE = 96
PICTURES = {"fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cutouts": (3, 96, 96)}
# One of each detector, segmenter and classifier, of each method with numbers of tokens and of each architecture.
SMALL = {
    *("mmdet/mask-rcnn_gtp-deit-s_fpn_1x_coco", "mmdet/retinanet_tome-deit-s_fpn_1x_coco"),
    "mmdet/retinanet_casvit-m_fpn_1x_coco",
    *(
        "mmdet/composites/mask-rcnn_supertoken",
        "mmdet/composites/mask-rcnn_tiny-vit",
        "mmdet/garments/mask-rcnn_tome-nano",
    ),
    *("mmseg/upernet_gtp-deit-s_8xb2-160k_ade20k-512x512", "mmseg/segmenter_evit-vit-b_mask_8xb1-160k_ade20k-512x512"),
    *("mmseg/setr_vit-b_naive_8xb2-160k_ade20k-512x512", "mmseg/fpn_supertoken-s_4xb4-80k_ade20k-512x512"),
    "mmseg/linear_dinov2-s_8xb2-40k_ade20k-512x512",
    *("mmseg/composites/upernet_algm", "mmseg/composites/upernet_evit", "mmseg/composites/upernet_hot"),
    *("mmseg/composites/upernet_stvit-r", "mmseg/composites/upernet_swin"),
    *("mmpretrain/dynamicvit-deit-s_8xb128-30e_in1k", "mmpretrain/mctf-deit-s_8xb128-30e_in1k"),
    *("mmpretrain/gtp-deit-s_in1k", "mmpretrain/cifar10/vit-nano_cifar10", "mmpretrain/cutouts/vit-nano_cutouts"),
    *(f"mmpretrain/fashion-mnist/finetune_{name}" for name in ("ats", "evit_distilled", "gtp", "tome")),
    *(f"mmpretrain/fashion-mnist/scratch_{name}" for name in ("lookupvit", "sit", "stvit", "supertoken")),
    *(f"mmpretrain/fashion-mnist/scratch_{name}" for name in ("attentive-mask", "tapadl")),
}
# One of each head on a frozen backbone, and of each way that it is reduced; they train with four blocks.
FROZEN = {
    *("mmdet/mask-rcnn_dinov3-s_fpn_1x_coco", "mmdet/retinanet_expedite-dinov3-b_fpn_1x_coco"),
    *("mmseg/linear_tome-dinov3-b_8xb2-40k_ade20k-512x512", "mmseg/upernet_dinov2-b_8xb2-160k_ade20k-512x512"),
    "mmseg/mask2former_expedite-dinov3-l_8xb2-160k_ade20k-512x512",
    "mmseg/dpt_tome-dinov3-b_8xb2-160k_ade20k-512x512",
}
# (H, W) that a pipeline may be given: one pixel, a row and a column of COCO's longest side, and a square.
SOURCES = {(1, 1), (1, 640), (640, 1), (640, 640)}
SAME_SIZE = {
    *("LoadImageFromFile", "LoadAnnotations", "RandomFlip", "PhotoMetricDistortion", "RandAugment", "RandomErasing"),
    *("PackDetInputs", "PackSegInputs", "PackInputs"),
}
# What takes no weight decay, by recipe: detectron2's ViTDet (weight_decay_norm and the override of pos_embed in
# mask_rcnn_vitdet_b_100ep.py), mmdet's and mmseg's Swin and ViT, timm's rule in DeiT's and Swin's classifiers, and none
# in those of PVT, CAS-ViT, SETR and Segmenter. A class token counts as a position embedding: ViTDet has none.
POSITIONS = r"features\.model\.(cls_token|pos_embed\w*)$"
# SiT's reverse modules decay whole, in a group of their own (main.py@f577808 ``get_param_groups``, "rtsm").
DECAYED = "model.reverse."
RECIPES: list[tuple[str, str, tuple[str, ...]]] = [
    (r"mmdet/.*(deit-s|vit-b|lookupvit)", POSITIONS, ("norm",)),
    (r"mmdet/.*(stvit-r|supertoken)", r"relative_position_bias_table$", ("norm",)),
    (r"mmdet/retinanet_casvit|mmseg/(fpn|setr|segmenter)_", r"$^", ()),
    (r"mmseg/upernet_(stvit-r|supertoken)", r"relative_position_bias_table$", ("norm",)),
    (r"mmseg/upernet_", POSITIONS, ("norm",)),
    (
        r"mmpretrain/(sit|lookupvit|evit|ats|tome|dynamicvit|mctf|stvit-deit)",
        r"^model\.(cls_token|pos_embed\w*)$",
        ("norm", "bias", "flat"),
    ),
    (r"mmpretrain/", r"relative_position_bias_table$", ("norm", "bias", "flat")),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*(instance named of|__floordiv__|torch.meshgrid).*:UserWarning")


def read(path: Path) -> Config:
    """A config that asks for no weights."""
    config = without_pretrained(load_config(path))
    init_default_scope(config.default_scope)
    return config


def name(path: Path) -> str:
    return path.relative_to(ROOT / "configs").with_suffix("").as_posix()


SMALL_CONFIGS = [path for path in CONFIGS if name(path) in SMALL]
FROZEN_CONFIGS = [path for path in CONFIGS if name(path) in FROZEN]


WIDTHS = {"small": 384, "base": 768, "large": 1024}  # of timm's vit_small, vit_base, vit_large


def is_frozen(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "backbone", None), "frozen", False))


def resized(sizes: set[tuple[int, int]], scales: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """(H, W) of pictures of those sizes, made as large as each of the scales holds, as mmcv rounds them."""
    return {rescale_size(size[::-1], scale)[::-1] for size in sizes for scale in scales}


def made(pipeline: Sequence[Any], sizes: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """(H, W) at both ends of every random choice that a pipeline makes of pictures of those sizes."""
    for step in pipeline:
        kind = step["type"]
        if kind == "RandomChoice":
            sizes = set().union(*(made(branch, sizes) for branch in step["transforms"]))
        elif step.get("resize_type") == "ResizeShortestEdge":
            sizes = resized(sizes, [(step["max_size"], side) for side in step["scales"]])
        elif kind in ("Resize", "RandomChoiceResize") and step["keep_ratio"]:
            sizes = resized(sizes, step.get("scales") or [step["scale"]])
        elif kind == "RandomResize" and step["keep_ratio"]:
            sizes = resized(sizes, [tuple(int(side * r) for side in step["scale"]) for r in step["ratio_range"]])
        elif kind == "RandomCrop":
            ranged = step.get("crop_type") == "absolute_range"
            crops = product(step["crop_size"], repeat=2) if ranged else [step["crop_size"]]
            sides = [(crop, crop) if isinstance(crop, int) else crop for crop in crops]
            margin = 2 * step.get("padding", 0)
            sizes = {(min(h + margin, a), min(w + margin, b)) for h, w in sizes for a, b in sides}
        elif kind == "RandomResizedCrop":
            sizes = {(step["scale"], step["scale"])}
        else:
            assert kind in SAME_SIZE, f"{kind} may change the size of a picture: say here to what"
    return sizes


def pictures(config: Config) -> list[tuple[int, int]]:
    """(H, W) of the smallest, the lowest and the narrowest picture that the model of a config trains on."""
    dataset = config.train_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    known = PICTURES.get(Path(str(config.filename)).parent.name)
    sizes = made(dataset.get("pipeline", ()), SOURCES if known is None else {known[1:]})
    preprocessor = config.model.get("data_preprocessor", {})
    least, divisor = preprocessor.get("size", (1, 1)), preprocessor.get("pad_size_divisor", 1)
    padded = {tuple(ceil(max(sides) / divisor) * divisor for sides in zip(s, least, strict=True)) for s in sizes}
    keys = (prod, lambda size: (size[0] / size[1], prod(size)), lambda size: (size[1] / size[0], prod(size)))
    return list(dict.fromkeys(min(padded, key=key) for key in keys))


def undecayed(model: nn.Module, tables: str, kinds: tuple[str, ...]) -> set[str]:
    """Names of the backbone's parameters that a recipe exempts from weight decay."""
    exempt = set()
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{own}"
            kind = "norm" if "Norm" in type(module).__name__ else own if own == "bias" else "flat"
            if re.search(tables, path) or (parameter.ndim <= 1 and kind in kinds):
                exempt.add(path)
    return exempt


def inputs(config: Config) -> dict[str, Any]:
    """Two random pictures with annotations, as the data preprocessor takes them."""
    if config.default_scope == "mmdet":
        with_masks = "mask_head" in config.model.get("roi_head", {})
        channels = len(config.model.data_preprocessor.mean)
        shapes, classes = [(channels, SIDE, SIDE)] * 2, len(config.get("classes", range(80)))
        return demo_mm_inputs(2, shapes, num_items=[2, 2], num_classes=classes, with_mask=with_masks)
    generator = torch.Generator().manual_seed(0)
    if config.default_scope == "mmpretrain":
        shape = PICTURES.get(Path(str(config.filename)).parent.name, (3, 224, 224))
        pictures = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(2)]
        samples = [DataSample().set_gt_label(label) for label in (3, 7)]
        if config.model.type == "PatchTaughtClassifier":
            patch_size = config.train_dataloader.dataset.patch_size
            for sample in samples:
                sample.patch_label = sample.gt_label.expand(prod(shape[1:]) // patch_size**2)
        return {"inputs": pictures, "data_samples": samples}
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo={"img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE)})
        labels = torch.randint(0, config.model.decode_head.num_classes, (1, SIDE, SIDE), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    pictures = [torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator) for _ in range(2)]
    return {"inputs": pictures, "data_samples": samples}


def anchor_strides(model: Any) -> list[tuple[int, int]]:
    """Strides (W, H) a detector lays its anchors at, level by level; none for a segmenter."""
    head = getattr(model, "rpn_head", None) or getattr(model, "bbox_head", None)
    return head.prior_generator.strides if head is not None else []


def train_a_step(model: Any, config: Config) -> None:
    """A step with the config's optimizer: losses are finite, maps fit their anchors, and weights change.

    Those of a frozen backbone do not, and it stays in eval mode; nor do those at a rate of 0, as the class token and
    the positions of DynamicViT's recipe.
    """
    # Mixed precision with a loss scale is asked for on the command line.
    assert config.optim_wrapper.get("type", "OptimWrapper") in ("OptimWrapper", "BFloat16OptimWrapper")
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    sizes: list[tuple[int, ...]] = []
    if anchor_strides(model):
        model.neck.register_forward_hook(lambda module, args, maps: sizes.extend(tuple(x.shape[-2:]) for x in maps))
    trained = model if is_frozen(model) else getattr(model, "backbone", model)
    still = [(p, p.detach().clone()) for group in wrapper.param_groups if group["lr"] == 0 for p in group["params"]]
    fixed = {id(p) for p, _ in still}
    weight = next(p for p in trained.parameters() if p.ndim > 1 and p.requires_grad and id(p) not in fixed)
    before = weight.detach().clone()
    kept = {own: value.clone() for own, value in model.backbone.state_dict().items()} if is_frozen(model) else {}
    model.train()
    losses = model.train_step(inputs(config), wrapper)
    assert sizes == [(-(-SIDE // height), -(-SIDE // width)) for width, height in anchor_strides(model)]
    assert losses
    assert all(bool(torch.as_tensor(value).isfinite().all()) for value in losses.values())
    assert not torch.equal(before, weight)
    assert all(torch.equal(value, p) for p, value in still)
    if kept:
        assert all(torch.equal(value, kept[own]) for own, value in model.backbone.state_dict().items())
        assert not [own for own, p in model.backbone.named_parameters() if p.requires_grad]
        assert not [own for own, module in model.backbone.named_modules() if module.training]


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_config_builds_as_it_ships_for_images_of_any_size(path: Path) -> None:
    """Each block must leave a token of one patch, and of the extremes that the pipeline of the config makes."""
    config = read(path)
    with torch.device("cpu" if "segmenter" in name(path) else "meta"):  # mmseg's mask head reads values as it is made
        model = MODELS.build(config.model)
    if config.default_scope != "mmpretrain":
        check_channels(config.model, model.backbone.channels)  # effvit train refuses what this does
    sizes = pictures(config) if config.get("train_dataloader") else []
    for host in (module for module in model.modules() if isinstance(module, ReducedHost)):
        grids = [tuple(ceil(s / p) for s, p in zip(size, host.patch_embed.patch_size, strict=True)) for size in sizes]
        if host.dynamic_img_size:
            grids.append((1, 1))
        else:
            assert config.default_scope == "mmpretrain"
            assert grids in ([], [host.patch_embed.grid_size])  # classifiers crop to one size
            grids = [host.patch_embed.grid_size]
        assert all(min(host.token_counts(grid)) >= 1 for grid in grids)
    if "optim_wrapper" not in config or name(path).count("/") > 1:  # recipes of the small sets are our own
        return
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    names = {id(parameter): own for own, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    if is_frozen(model):  # all the rest learns, and nothing of it
        assert decay.keys() == {own for own in names.values() if not own.startswith("backbone.")}
        return
    tables, kinds = next((tables, kinds) for rule, tables, kinds in RECIPES if re.match(rule, name(path)))
    backbone = model.backbone if hasattr(model, "backbone") else model.model
    prefix = "backbone." if hasattr(model, "backbone") else "model."
    exempt = {own for own in undecayed(model, tables, kinds) if own.startswith(prefix) and not own.startswith(DECAYED)}
    base = config.optim_wrapper.optimizer.weight_decay
    assert len(list(backbone.parameters())) == sum(own.startswith(prefix) for own in decay)
    assert {own: 0.0 if own in exempt else base for own in decay if own.startswith(prefix)} == {
        own: value for own, value in decay.items() if own.startswith(prefix)
    }


@pytest.mark.parametrize(
    "path",
    released((path for path in CONFIGS if not name(path).startswith("mmpretrain/")), SMALL_CONFIGS),
    ids=name,
)
def test_backbone_gives_whole_maps_of_the_extremes_of_its_pipeline(path: Path) -> None:
    """A map has a row for each stride begun: by the strides the model tells, on the meta device."""
    config = read(path)
    with torch.device("meta"):
        backbone = MODELS.build(config.model.backbone)
        strides = backbone.features.feature_info.reduction()
        for size in pictures(config):
            maps = backbone(torch.empty(2, len(config.model.data_preprocessor.mean), *size))
            expected = [tuple(ceil(side / stride) for side in size) for stride in strides]
            assert [tuple(x.shape[2:]) for x in maps] == expected


@pytest.mark.parametrize(
    "path",
    released(CONFIGS, SMALL_CONFIGS),
    ids=name,
)
def test_config_trains_and_predicts(path: Path) -> None:
    config = read(path)
    if config.default_scope == "mmseg":
        config.model.data_preprocessor.size = (SIDE, SIDE)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config.model))
    if "optim_wrapper" in config:
        train_a_step(model, config)
    model.eval()
    with torch.no_grad():
        predictions = model.test_step(inputs(config))
    assert len(predictions) == 2


def test_command_line_reduces_a_frozen_backbone() -> None:
    """The example of configs/README.md; 12 blocks of 68 leave 208 of 1024 patches."""
    config = read(ROOT / "configs/mmseg/linear_dinov3-s_8xb2-40k_ade20k-512x512.py")
    config.merge_from_dict({"model.backbone.sparsify.method": "tome", "model.backbone.sparsify.r": 68})
    with torch.device("meta"):
        backbone = MODELS.build(config.model.backbone)
    assert backbone.model.token_counts((32, 32))[-1] == 1024 - 12 * 68


def narrowed(part: Any, width: int) -> Any:
    """A part of a config in which 96 channels stand for the width of the backbone."""
    if isinstance(part, dict):
        return {key: narrowed(value, width) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [narrowed(value, width) for value in part]
    return 96 if part == width else part


@pytest.mark.parametrize("path", FROZEN_CONFIGS, ids=name)
def test_head_of_a_frozen_recipe_trains_alone(path: Path) -> None:
    """Four blocks of 96 channels stand for the backbone, and 112 points for the 12544 that Mask2Former compares."""
    config = read(path)
    size = next(size for size in WIDTHS if f"vit_{size}_" in config.model.backbone.model_name)
    heads = {key: narrowed(part, WIDTHS[size]) for key, part in config.model.items() if key.endswith(("neck", "head"))}
    config.merge_from_dict({"model": heads})
    if "mask2former" in name(path):
        config.model.decode_head.train_cfg.num_points = 112
    config.model.backbone.update(depth=4, embed_dim=96, num_heads=3)
    config.model.backbone.out_indices = tuple(range(4))[-len(config.model.backbone.out_indices) :]
    if config.default_scope == "mmseg":
        config.model.data_preprocessor.size = (SIDE, SIDE)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config.model))
    train_a_step(model, config)
    model.eval()
    with torch.no_grad():
        predictions = model.test_step(inputs(config))
    assert len(predictions) == 2


def test_rates_of_the_linear_classifiers_are_those_of_their_sources() -> None:
    """A line to 0 (DINOv2) or a cosine (DINOv3) in closed form, under a linear warm-up from 1e-6 of it.

    A hundredth of the iterations is run, 400 with 15 of warm-up. mmengine ends lines an iteration earlier.
    """
    falls: dict[str, Callable[[int], float]] = {
        "dinov2": lambda i: 1 - i / 399,
        "dinov3": lambda i: (1 + cos(pi * i / 400)) / 2,
    }
    for source, fall in falls.items():
        config = load_config(ROOT / f"configs/mmseg/linear_{source}-s_8xb2-40k_ade20k-512x512.py")
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
        schedulers = []
        for entry in config.param_scheduler:
            short = {key: entry[key] // 100 for key in ("begin", "end", "T_max") if key in entry}
            schedulers.append(PARAM_SCHEDULERS.build({**entry, **short}, default_args={"optimizer": optimizer}))
        rates = []
        for _ in range(config.train_cfg.max_iters // 100):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        warm_up = [min(1.0, 1e-6 + (1 - 1e-6) * i / 14) for i in range(400)]
        assert rates == pytest.approx([1e-3 * warm_up[i] * fall(i) for i in range(400)], rel=1e-6)


def test_warm_up_of_casvit_is_the_official_line_from_zero_but_for_its_first_rate() -> None:
    """numpy.linspace from --warmup_start_lr 0 to --lr (main.py of Tianfang-Zhang/CAS-ViT@041d2d6)."""
    config = load_config(ROOT / "configs/mmpretrain/casvit-m_8xb256-300e_in1k.py")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optim_wrapper.optimizer.lr)
    warm_up = PARAM_SCHEDULERS.build(
        config.param_scheduler[0], default_args={"optimizer": optimizer, "epoch_length": (length := 5)}
    )
    rates = []
    for _ in range(20 * length):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warm_up.step()
    assert torch.allclose(torch.tensor(rates), torch.linspace(0, 6e-3, 20 * length), rtol=0, atol=6.1e-9)


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs/mmdet/composites/mask-rcnn_tiny-vit.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at data/mobile_sam/mobile_sam\.pt"):
        MODELS.build(config.model.backbone).init_weights()


def test_detectors_on_garments_know_the_classes_of_the_set() -> None:
    config = load_config(ROOT / "configs/mmdet/garments/mask-rcnn_vit-nano.py")
    assert config.train_dataloader.dataset.metainfo.classes == GARMENTS


def test_classifiers_of_cutouts_know_the_classes_of_the_set() -> None:
    config = load_config(ROOT / "configs/mmpretrain/cutouts/vit-nano_cutouts.py")
    init_default_scope(config.default_scope)
    assert config.model.num_classes == config.model.data_preprocessor.num_classes == len(CLASSES)
    assert CLASSIFIERS.build(config.model).model.num_classes == len(CLASSES)


def test_small_configs_are_configs() -> None:
    assert {name(path) for path in CONFIGS} >= SMALL | FROZEN


def test_every_config_says_where_its_settings_are_from() -> None:
    for path in CONFIGS:
        assert path.read_text().startswith("# "), path


def test_page_lists_every_config() -> None:
    page = (ROOT / "configs" / "README.md").read_text()
    listed = re.findall(r"\]\(([^)]+\.py)\)", page)
    assert sorted(listed) == sorted(path.relative_to(ROOT / "configs").as_posix() for path in CONFIGS)


@pytest.mark.parametrize(
    ("config", "batch", "rates"),
    [
        *((f"supertoken-{size}_8xb64-30e_in1k-384px", 512, {0: 5e-6, 29: 5e-6}) for size in "sbl"),
        ("casvit-m_8xb128-30e_in1k-384px", 1024, {10: 2.5e-5, 20: 5e-5, 29: 5e-5}),
    ],
)
def test_fine_tuning_at_384_pixels_is_the_official_one(config: str, batch: int, rates: dict[int, float]) -> None:
    """The rate at the beginning of epochs, each of ten iterations; pictures of 384 pixels in all three loaders."""
    found = read(ROOT / "configs/mmpretrain" / f"{config}.py")
    assert found.auto_scale_lr.base_batch_size == 8 * found.train_dataloader.batch_size == batch
    assert found.train_cfg.max_epochs == 30
    assert found.model.drop_path_rate == 0
    for loader in (found.train_dataloader, found.val_dataloader, found.test_dataloader):
        sizes = [step.get("scale", step.get("crop_size")) for step in loader.dataset.pipeline]
        assert {size for size in sizes if size} == {384}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=found.optim_wrapper.optimizer.lr)
    given = {"optimizer": optimizer, "epoch_length": 10}
    schedulers = [PARAM_SCHEDULERS.build(entry, default_args=given) for entry in found.param_scheduler]
    seen = []
    for _ in range(300):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert {epoch: seen[10 * epoch] for epoch in rates} == pytest.approx(rates, rel=0.01)
