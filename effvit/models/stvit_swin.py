"""STViT-R and STViT on Swin (arXiv 2303.08685): semantic tokens of each window in the third stage of a Swin.

"STViT" and "SViT" each name more than one paper; this is the one of semantic tokens ("Making Vision Transformers
Efficient from A Token Sparsification View", CVPR 2023).

* STViT-R recovers the image tokens at the end of each dumbbell unit of six blocks, so that it is a Swin to its users.
  Official code: changsn/STViT-R@b4a27a0 for classification, changsn/STViT-R-Object-Detection@8b8eb1e for dense tasks.
* STViT keeps the semantic tokens to the end. No source of it on Swin is public; see ``recovery`` below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import (
    ConvNormAct,
    LayerNorm2d,
    PatchEmbed,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    resize_rel_pos_bias_table,
    to_2tuple,
    trunc_normal_,
)
from timm.models._input import update_model_input_size
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from effvit.models._surface import PyramidBackbone, PyramidStage
from effvit.models.dumbbell import DumbbellUnit, GroupBlock, SemanticLayers, WindowBlock, check_key_windows
from effvit.recover import RestoreBlock, TokenRecovery
from effvit.schedule import check_count, check_switch
from effvit.tokens import fx_leaf
from effvit.windows import live_cells, num_windows, spread_cells

__all__ = ["STViTSwin"]

# What the six blocks of a unit are called here, in the order of the released code.
UNIT = ("block", "semantic.stgm1", "semantic.stgm2", "semantic.blocks.0", "semantic.blocks.1", "recover")
STEMS = ("conv", "patch")


@fx_leaf
def pad_images(x: Tensor, multiple: int = 4) -> Tensor:
    """Images (B, 3, H, W) with zeros at the bottom and right up to a multiple of the stride."""
    bottom, right = (-side % multiple for side in x.shape[2:])
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions of stride 2 with batch norm and Hardswish: images of any size -> (B, H/4, W/4, C)."""

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        layer = partial(ConvNormAct, kernel_size=3, stride=2, act_layer=nn.Hardswish, device=device, dtype=dtype)
        self.conv1, self.conv2 = layer(in_chans, dim // 2), layer(dim // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(pad_images(x))).permute(0, 2, 3, 1)


class STViTSwin(PyramidBackbone):
    """A Swin whose third stage works on the semantic tokens of its windows (STViT-R, STViT; 2303.08685).

    Images of any size: they are padded to a multiple of 4, windows as they need it.

    With recovery, the third stage is a row of dumbbell units of six blocks (see ``effvit.models.dumbbell``), and the
    second unit pools fresh seeds from recovered tokens. Batch norm in the stem, LayerScale only around semantic
    tokens and the drop path of each block are as released.

    STViT (``recovery=False``). Certain, from the paper: the STGM replaces image tokens by 9 or 16 semantic tokens a
    window from some layer of the third stage on, with -24, -25 and -25 % of FLOPs on Swin-T, -S and -B with 9. Ours:
    where, and what follows. Two thirds of the third stage are Swin blocks (4 of 6, 12 of 18), two STGM layers follow,
    then blocks on semantic tokens as in a dumbbell unit; Swin's own patch merging joins 2 x 2 semantic tokens, and
    the fourth stage attends among all of them. With Swin's own patch embedding this costs what the paper says; no
    other depth does, nor does any with a fourth stage on image tokens or on tokens that are not merged. Its maps of
    the last two stages give each position the semantic token of the cell it lies in, without parameters.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for none.
        global_pool: timm's pooling in front of the classifier, "" for none.
        embed_dim: Channels of the first stage; doubled in each.
        depths: Blocks of the four stages. With recovery, the third is a multiple of 6.
        num_heads: Heads of the four stages.
        window_size: Side of a window, one for all stages or one each.
        window_samples: Side of the semantic tokens of a window: 3 or, in STViT, also 4.
        mlp_ratio: Hidden channels of the MLPs over those of the tokens.
        qkv_bias: Biases of queries, keys and values.
        recovery: STViT-R; else STViT.
        stem: "conv", as released for STViT-R, or "patch", Swin's own patch embedding.
        key_windows: Which keys the STGM asks, see ``effvit.models.dumbbell``. "inside": windows of
            (window_size + 3)² image tokens moved inside the map, then all tokens. It is the released classification
            network at 224 pixels and works on maps of any size. "cls": 10 x 10 windows at a stride of 4, literals of
            the released classification code, which fit few maps. "dense": the released dense network.
        kernels: Sides of the key windows of the two STGM layers and of the recovery for "dense"; 2 and 3 windows
            and 9 times ``window_samples`` if None.
        mask_mode: What is seen of positions that only pad a window: "correct", nothing; "none" and "official" as
            released with and without ``pad_mask`` (see ``effvit.windows.key_mask``).
        shift_small: Shift windows in maps that one window covers, as the released dense code does.
        shortcut: Add the seeds to the attention of the first STGM layer. The paper and the dense code do, the
            published classification networks do not.
        use_global: Learned global cluster centres in the second STGM layer of the first unit. Fixes the image size.
        relative_pos: Relative position bias in the blocks on semantic tokens of "inside" and "cls". Fixes the image
            size.
        use_conv_pos: A depth-wise convolution on the seeds of each window.
        seed_pool: "max", as released, or "learned" as the paper describes.
        img_size: Image size that ``use_global`` and ``relative_pos`` are built for.
        out_norm: Normalise each map of ``forward_intermediates`` by a LayerNorm of its own, the last of which is
            that of the final features: the released dense backbone.
        drop_rate: Dropout in front of the classifier.
        proj_drop_rate: Dropout in the projections and MLPs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0. Published: 0.3 (S) and 0.4 (B) for
            classification, 0.2 and 0.3 for detection.

    Raises:
        TypeError, ValueError: A setting out of range, named with its value.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        window_samples: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        *,
        recovery: bool = True,
        stem: str = "conv",
        key_windows: str = "inside",
        kernels: Sequence[int] | None = None,
        mask_mode: str = "correct",
        shift_small: bool = False,
        shortcut: bool = False,
        use_global: bool = False,
        relative_pos: bool = False,
        use_conv_pos: bool = False,
        seed_pool: str = "max",
        img_size: int | tuple[int, int] = 224,
        out_norm: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_depths(depths, check_switch("recovery", recovery))
        check_key_windows(key_windows, check_switch("use_global", use_global), check_switch("relative_pos", relative_pos))
        if stem not in STEMS:
            raise ValueError(f"stem must be {' or '.join(map(repr, STEMS))}, got {stem!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(4)]
        norm = partial(LayerNorm2d, eps=1e-5, **dd)
        super().__init__(
            dims,
            num_classes,
            global_pool,
            in_chans,
            drop_rate=drop_rate,
            out_norm=norm if check_switch("out_norm", out_norm) else None,
            output_fmt="NHWC",
            **dd,
        )
        windows = (window_size,) * 4 if isinstance(window_size, int) else tuple(window_size)
        self.window, self.samples = check_count("window_size", windows[2], 1), check_count("window_samples", window_samples, 1)
        self.recovery, self.crops = recovery, mask_mode == "correct"
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        block: dict[str, Any] = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate}
        block |= {"attn_drop": attn_drop_rate, **dd}
        if kernels is None:
            dense = key_windows == "dense"
            kernels = (2 * self.window, 3 * self.window, 9 * window_samples) if dense else (self.window + 3,) * 3
        semantic = partial(
            SemanticLayers,
            dims[2],
            num_heads[2],
            window=self.window,
            samples=window_samples,
            kernels=kernels,
            key_windows=key_windows,
            grid=self._semantic_grid(img_size),
            shortcut=shortcut,
            relative_pos=relative_pos,
            use_conv_pos=use_conv_pos,
            seed_pool=seed_pool,
            mask_mode=mask_mode,
            **block,
        )
        if key_windows == "dense":
            recover = partial(RestoreBlock, window=self.window, samples=window_samples, kernel=kernels[2])
            recover = partial(recover, mask_mode=mask_mode)
        else:
            recover = partial(TokenRecovery)

        def swin_blocks(i: int, stage_rates: Sequence[float]) -> list[nn.Module]:
            return [
                WindowBlock(dims[i], num_heads[i], windows[i], j % 2 == 1, shift_small, drop_path=rate, **block)
                for j, rate in enumerate(stage_rates)
            ]

        if recovery:
            third: list[nn.Module] = [
                DumbbellUnit(
                    swin_blocks(2, rates[2][j : j + 1])[0],
                    semantic(rates[2][j + 1 : j + 5], use_global=use_global and j == 0),
                    recover(dims[2], num_heads[2], drop_path=rates[2][j + 5], **block),
                )
                for j in range(0, depths[2], 6)
            ]
            fourth = swin_blocks(3, rates[3])
        else:
            base = depths[2] * 2 // 3
            third = [*swin_blocks(2, rates[2][:base]), semantic(rates[2][base:], use_global=use_global)]
            fourth = [GroupBlock(dims[3], num_heads[3], drop_path=rate, **block) for rate in rates[3]]
        stages = (swin_blocks(0, rates[0]), swin_blocks(1, rates[1]), third, fourth)
        if stem == "conv":
            self.stem = ConvStem(in_chans, embed_dim, **dd)
        else:
            self.stem = PatchEmbed(
                None, 4, in_chans, embed_dim, nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True, **dd
            )
        self.stages = nn.Sequential(
            *(
                PyramidStage(PatchMerging(dims[i - 1], **dd) if i else None, blocks)
                for i, blocks in enumerate(stages)
            )
        )
        self.norm = nn.Identity() if out_norm else norm(dims[3])
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers from N(0, 0.02) truncated with zero biases, as released; all else as its class does it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _semantic_grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the semantic tokens of an image of that size."""
        height, width = (
            live_cells(side, self.window, self.samples)
            if self.crops
            else num_windows(side, self.window) * self.samples
            for side in (-(-pixels // 16) for pixels in to_2tuple(img_size))
        )
        return height, width

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.out_norms is None else self.out_norms[-1](x)

    def _prune_final(self) -> None:
        self.norm = nn.Identity()

    def _stage_map(self, i: int, x: Tensor, images: Tensor) -> Tensor:
        if not self.recovery and i >= 2:
            size = tuple(-(-side // (4 * 2**i)) for side in images.shape[-2:])
            x = spread_cells(x, size, self.window, self.samples, merged=2 ** (i - 2))
        return self._to_maps(x)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Resample ``use_global`` and ``relative_pos`` to the semantic grid of an image size; nothing else needs one."""
        super().set_input_size(img_size, patch_size)
        if img_size is None:
            return
        layers = [module for module in self.modules() if isinstance(module, SemanticLayers) and module.grid]
        for module in layers:
            module.set_grid(self._semantic_grid(img_size))
        if layers:
            update_model_input_size(self, to_2tuple(img_size))

    def no_weight_decay(self) -> set[str]:
        """Names of the position tables, which take no weight decay."""
        tables = ("relative_position_bias_table", "global_centres")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Weights of an official file, of classification or of the dense backbone, or of our own, under our names.

        Position tables of another size are resampled as timm does it. A classifier is dropped where the model has
        none. A classification file fits a dense model: its final norm is dropped and the norms of the maps keep
        the values they have.

        Returns:
            The weights, and the names of what was dropped.
        """
        renamed = {name: official_name(name) for name in state}
        kept = {new: state[name] for name, new in renamed.items() if new is not None}
        dropped = [name for name, new in renamed.items() if new is None]
        own = self.state_dict()
        unused = tuple(
            part for part in ("head.", "norm.") if not any(name.startswith(part) for name in own)
        )
        if unused:
            dropped += [name for name, new in renamed.items() if new is not None and new.startswith(unused)]
            kept = {name: value for name, value in kept.items() if not name.startswith(unused)}
        if self.out_norms is not None and not any(name.startswith("out_norms.") for name in kept):
            kept |= {name: value for name, value in own.items() if name.startswith("out_norms.")}
        return {name: resized(value, name, self) for name, value in kept.items()}, dropped


def check_depths(depths: Sequence[int], recovery: bool) -> None:
    """Raise a ValueError unless the third stage can be built of that many blocks."""
    if len(depths) != 4:
        raise ValueError(f"depths must name the blocks of four stages, got {list(depths)}")
    if recovery and (depths[2] % 6 or depths[2] == 0):
        raise ValueError(
            f"the third stage is a row of dumbbell units of six blocks, so that its depth must be a multiple of 6, "
            f"got {depths[2]}; without a whole unit its last image tokens would not be recovered. Use 6, 12 or 18, or "
            "recovery=False"
        )
    if not recovery and depths[2] < 4:
        raise ValueError(f"recovery=False needs at least 4 blocks in the third stage, got {depths[2]}")


RENAMED = (
    (r"^patch_embed\.proj\.0\.c\.", "stem.conv1.conv."),
    (r"^patch_embed\.proj\.0\.bn\.", "stem.conv1.bn."),
    (r"^patch_embed\.proj\.2\.c\.", "stem.conv2.conv."),
    (r"^patch_embed\.proj\.2\.bn\.", "stem.conv2.bn."),
    (r"^norm(\d)\.", r"out_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^layers\.2\.semantic_token2$", "stages.2.blocks.0.semantic.stgm2.global_centres"),
    (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.2\.blocks\.(\d+)\.", lambda m: f"stages.2.blocks.{int(m[1]) // 6}.{UNIT[int(m[1]) % 6]}."),
    (r"^layers\.", "stages."),
    (r"\.layer_scale_(\d)$", r".ls\1.gamma"),
    (r"\.conv_pos\.proj\.0\.", ".conv_pos."),
    (r"(semantic\.blocks\.\d+)\.attn\.(relative_position_bias_table)$", r"\1.rel_pos.\2"),
)


def official_name(name: str) -> str | None:
    """Our name of an entry of an official file, or of our own; None for tables that are computed."""
    if name.endswith(("attn_mask", "relative_position_index")):
        return None
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def resized(value: Tensor, name: str, model: STViTSwin) -> Tensor:
    """A position table of a file in the size the model has; any other weight as it is."""
    own = dict(model.named_parameters()).get(name)
    if own is None or value.shape == own.shape:
        return value
    if name.endswith(".relative_position_bias_table"):
        window = model.get_submodule(name.rpartition(".")[0]).window_size
        return resize_rel_pos_bias_table(value, new_window_size=window, new_bias_shape=own.shape)
    if name.endswith(".global_centres"):
        layers = model.get_submodule(name.removesuffix(".stgm2.global_centres"))
        return resample_abs_pos_embed(value, layers.grid, num_prefix_tokens=0)
    return value
