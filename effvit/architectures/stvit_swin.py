"""STViT-R and STViT on Swin (arXiv 2303.08685): semantic tokens of each window in the third stage of a Swin.

"STViT" and "SViT" each name more than one paper; this is the one of semantic tokens ("Making Vision Transformers
Efficient from A Token Sparsification View", CVPR 2023).

* STViT-R recovers the image tokens at the end of each dumbbell unit of six blocks, so that it is a Swin to its users.
  Official code: changsn/STViT-R@b4a27a0 for classification, changsn/STViT-R-Object-Detection@8b8eb1e for dense tasks.
* STViT keeps the semantic tokens to the end. No source of it on Swin is public; see ``recovery`` below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypedDict, cast

import torch
from timm.layers import (
    LayerNorm2d,
    PatchEmbed,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    to_2tuple,
)
from timm.models._input import update_model_input_size
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from effvit.architectures._stvit_r_names import official_name
from effvit.architectures.base import PyramidBackbone, PyramidStage, pooled_head
from effvit.architectures.dumbbell import (
    DumbbellUnit,
    GroupBlock,
    Recovery,
    SemanticLayers,
    check_key_windows,
    recovery_terms,
)
from effvit.architectures.swin_parts import ConvStem, WindowBlock
from effvit.hosts.stages import Stage, soft_stage
from effvit.layers.cross_attention import SharedSettings
from effvit.layers.macs import Terms, convolutions, layers, norm, window_block
from effvit.layers.windows import live_cells, num_windows, resize_bias_table, spread_cells
from effvit.protocols import Device, Factory, Size
from effvit.recording import compile_each_size, refuse_legacy_onnx, refuse_open_sides
from effvit.recover import RestoreBlock, TokenRecovery
from effvit.schedule import check_count, check_switch

__all__ = ["STViTSwin"]

STEMS = ("conv", "patch")
LAYER_SCALE = 1e-5  # of the released blocks


class NearWindows(TypedDict):
    """Keywords of all layers that attend to windows."""

    window: int
    samples: int
    mask_mode: str


class SemanticSettings(TypedDict, total=False):
    """Keywords of ``SemanticLayers`` that are the same in all units of a model."""

    key_windows: str
    grid: Size
    shortcut: bool
    relative_pos: bool
    use_conv_pos: bool
    seed_pool: str


MakesSemantic: TypeAlias = Callable[..., SemanticLayers]


class BlockMaker(NamedTuple):
    """Makes the blocks of each stage.

    Attributes:
        dims: Channels of the stages.
        num_heads: Heads of the stages.
        windows: Sides of the windows of the stages.
        rates: Stochastic depth of each block, by stage.
        shift_small: As for ``WindowBlock``.
        init_values: Initial LayerScale of the Swin blocks of all stages but the third; None for none.
        shared: Keywords of all blocks.
    """

    dims: Sequence[int]
    num_heads: Sequence[int]
    windows: Sequence[int]
    rates: Sequence[Sequence[float]]
    shift_small: bool
    init_values: float | None
    shared: SharedSettings

    def swin(self, i: int, first: int = 0, last: int | None = None) -> list[nn.Module]:
        """Swin blocks in place of those of stage i from ``first`` to before ``last``."""
        scale = None if i == 2 else self.init_values
        form: SharedSettings = {**self.shared, "init_values": scale}
        sides = self.dims[i], self.num_heads[i], self.windows[i]
        return [
            WindowBlock(*sides, j % 2 == 1, self.shift_small, drop_path=rate, **form)
            for j, rate in enumerate(self.rates[i][first:last])
        ]

    def stages(
        self, semantic: MakesSemantic, recover: Callable[..., Recovery] | None, use_global: bool
    ) -> list[list[nn.Module]]:
        """The blocks of the four stages: of an STViT-R with ``recover``, else of an STViT."""
        if recover is not None:
            late = [self.dumbbells(semantic, recover, use_global), self.swin(3)]
        else:
            late = [self.semantic_to_the_end(semantic, use_global), self.grouped(3)]
        return [self.swin(0), self.swin(1), *late]

    def dumbbells(self, semantic: MakesSemantic, recover: Callable[..., Recovery], use_global: bool) -> list[nn.Module]:
        """The third stage as a row of dumbbell units, of which the first may have global centres."""
        dim, heads, rates = self.dims[2], self.num_heads[2], self.rates[2]
        return [
            DumbbellUnit(
                self.swin(2, j, j + 1)[0],
                semantic(rates[j + 1 : j + 5], use_global=use_global and j == 0),
                recover(dim, heads, drop_path=rates[j + 5], **self.shared),
            )
            for j in range(0, len(rates), 6)
        ]

    def semantic_to_the_end(self, semantic: MakesSemantic, use_global: bool) -> list[nn.Module]:
        """The third stage of an STViT: two thirds of Swin blocks, then layers whose semantic tokens stay."""
        rates = self.rates[2]
        base = len(rates) * 2 // 3
        return [*self.swin(2, 0, base), semantic(rates[base:], use_global=use_global)]

    def grouped(self, i: int) -> list[nn.Module]:
        """Blocks of stage i that attend among all semantic tokens."""
        return [GroupBlock(self.dims[i], self.num_heads[i], drop_path=rate, **self.shared) for rate in self.rates[i]]


class STViTSwin(PyramidBackbone):
    """A Swin whose third stage works on the semantic tokens of its windows (STViT-R, STViT; 2303.08685).

    Images of any size: they are padded to a multiple of 4, windows as they need it.

    With recovery, the third stage is a row of dumbbell units of six blocks (see ``effvit.architectures.dumbbell``), and
    the second unit pools fresh seeds from recovered tokens. Batch norm in the stem, LayerScale only around semantic
    tokens (see ``use_layer_scale``) and the drop path of each block are as released.

    STViT (``recovery=False``). Certain, from the paper: the STGM replaces image tokens by 9 or 16 semantic tokens a
    window from some layer of the third stage on, with -24, -25 and -25 % of FLOPs on Swin-T, -S and -B with 9. Ours:
    where, and what follows. Two thirds of the third stage are Swin blocks (4 of 6, 12 of 18), two STGM layers follow,
    then blocks on semantic tokens as in a dumbbell unit; Swin's own patch merging joins 2 x 2 semantic tokens, and
    the fourth stage attends among all of them. With Swin's own patch embedding this comes within one point of the
    paper's ratios for all three sizes; of the wirings counted (either stem, any depth, a fourth stage on image tokens
    or on tokens that are not merged) no other does at one fraction of the third stage. Maps of the last two stages
    give each position the semantic token of the cell it lies in, without parameters.

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
        key_windows: Which keys the STGM attends to, see ``effvit.architectures.dumbbell``. "inside": windows of
            (window_size + 3)² image tokens moved inside the map, then all tokens. It is the released classification
            network at 224 pixels and works on maps of any size. "cls": 10 x 10 windows at a stride of 4, literals of
            the released classification code, which fit few maps. "dense": the released dense network.
        kernels: Only for "dense": sides of the key windows of the two STGM layers and of the recovery; 2 and 3
            windows and 9 times ``window_samples`` if None.
        mask_mode: What is seen of positions that only pad a window: "correct", nothing; "none" and "official" as
            released with and without ``pad_mask`` (see ``effvit.layers.windows.key_mask``).
        shift_small: Shift windows in maps that one window covers, as the released dense code does.
        shortcut: Add the seeds to the attention of the first STGM layer. The paper and the dense code do, the
            published classification networks do not.
        use_global: Learned global cluster centres in the second STGM layer of the first unit. Fixes the image size.
        relative_pos: Relative position bias in the blocks on semantic tokens of "inside" and "cls". Fixes the image
            size.
        use_conv_pos: A depth-wise convolution on the seeds of each window.
        seed_pool: "max", as released, or "learned" as the paper describes.
        use_layer_scale: LayerScale, 1e-5 at first, in the Swin blocks of all stages but the third too, as the argument
            of that name of the released classification network. Its training script never sets it, so that the
            published weights have none, whatever the logs say.
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
        use_layer_scale: bool = False,
        img_size: int | tuple[int, int] = 224,
        out_norm: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_third_stage(depths, check_switch("recovery", recovery), key_windows, use_global, relative_pos)
        dd: Factory = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(4)]
        norm = partial(LayerNorm2d, eps=1e-5, **dd)
        out = norm if check_switch("out_norm", out_norm) else None
        super().__init__(
            dims, num_classes, global_pool, in_chans, drop_rate=drop_rate, out_norm=out, output_fmt="NHWC", **dd
        )
        windows = check_windows(window_size)
        self.window, self.samples = windows[2], check_count("window_samples", window_samples, 1)
        self.recovery, self.crops = recovery, mask_mode == "correct"
        shared: SharedSettings = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "device": device, "dtype": dtype}
        shared |= {"proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate}
        rates: list[list[float]] = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        scale = LAYER_SCALE if check_switch("use_layer_scale", use_layer_scale) else None
        blocks = BlockMaker(dims, num_heads, windows, rates, shift_small, scale, shared)
        sides = check_kernels(kernels, key_windows, self.window, window_samples)
        form: SemanticSettings = {"shortcut": shortcut, "relative_pos": relative_pos, "use_conv_pos": use_conv_pos}
        form |= {"seed_pool": seed_pool, "key_windows": key_windows, "grid": self._semantic_grid(img_size)}
        near: NearWindows = {"window": self.window, "samples": window_samples, "mask_mode": mask_mode}
        semantic = partial(SemanticLayers, dims[2], num_heads[2], kernels=sides[:2], **form, **near, **shared)
        recover = partial(RestoreBlock, kernel=sides[2], **near) if key_windows == "dense" else TokenRecovery
        self.stem = make_stem(stem, in_chans, embed_dim, dd)
        self.stages = merging_stages(dims, blocks.stages(semantic, recover if recovery else None, use_global), dd)
        self.norm = nn.Identity() if out_norm else norm(dims[3])
        self.init_weights(needs_reset=False)

    def _narrow_linears(self) -> list[nn.Linear]:
        return [module for module in self.modules() if isinstance(module, nn.Linear)]  # as released

    def _semantic_grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the semantic tokens of an image of that size."""
        height, width = (
            live_cells(side, self.window, self.samples) if self.crops else num_windows(side, self.window) * self.samples
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

    def set_input_size(self, img_size: int | Size | None = None, patch_size: int | Size | None = None) -> None:
        """Resample the tables of ``use_global`` and ``relative_pos`` to an image size; nothing else depends on one."""
        super().set_input_size(img_size, patch_size)
        if img_size is None:
            return
        layers = [module for module in self.modules() if isinstance(module, SemanticLayers) and module.grid]
        for module in layers:
            module.set_grid(self._semantic_grid(img_size))
        if layers:
            update_model_input_size(self, to_2tuple(img_size))

    def _check_input(self, x: Tensor) -> None:
        super()._check_input(x)
        refuse_legacy_onnx("an STViT on Swin")
        refuse_open_sides(x.shape[-2:], 0, "an STViT on Swin", "window counts")
        compile_each_size(x.shape[-2:])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As of any pyramid; the blocks inside a dumbbell unit and those on semantic tokens count one by one."""
        groups = super().group_matcher(coarse)
        if not coarse:
            third = r"^stages\.(2)\.blocks\.(\d+)\."
            parts = ("block", r"(?:semantic\.)?stgm1", r"(?:semantic\.)?stgm2")
            rules: list[Any] = [(rf"{third}{part}\.", (order,)) for order, part in enumerate(parts, -len(parts))]
            rules += [(rf"{third}(?:semantic\.)?blocks\.(\d+)", None), (rf"{third}recover\.", (math.inf,))]
            if self.recovery:
                rules.append((r"^stages\.(2)\.downsample", (0, -len(parts))))  # with the first block of the stage
            groups["blocks"] = rules + groups["blocks"]
        return groups

    def no_weight_decay(self) -> set[str]:
        """Names of the position tables, which take no weight decay."""
        tables = ("relative_position_bias_table", "global_centres")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term: semantic tokens of each window in the third stage."""
        size = -(-size[0] // 4) * 4, -(-size[1] // 4) * 4
        terms, size = convolutions("embedding", self.stem, size)
        stages: Iterable[PyramidStage] = self.stages
        for stage in stages:
            if not isinstance(stage.downsample, nn.Identity):
                size = -(-size[0] // 2), -(-size[1] // 2)
                terms += layers("embedding", stage.downsample, size[0] * size[1])
            for block in stage.blocks:
                if isinstance(block, DumbbellUnit):
                    assert isinstance(block.block, WindowBlock)
                    terms += window_block(block.block, size)
                    more, semantic = block.semantic.closed_form(size)
                    terms += more + recovery_terms(block.recover, size, semantic)
                elif isinstance(block, SemanticLayers):
                    more, size = block.closed_form(size)
                    terms += more
                elif isinstance(block, GroupBlock):
                    terms += block.closed_form(size)
                else:
                    assert isinstance(block, WindowBlock)
                    terms += window_block(block, size)
        final = self.norm if self.out_norms is None else self.out_norms[-1]
        return terms + norm(final, size[0] * size[1]) + pooled_head(self.head, size)

    def trace_stages(self, x: Tensor) -> list[Stage]:
        """Shares of the semantic tokens of an image (1, 3, H, W) where they are made; the model must be in eval mode.

        Raises:
            ValueError: Key windows that do not give every patch its shares.
        """
        self._check_input(x)
        x, number, stages = self.stem(x), 0, []  # (B, H, W, C)
        for stage in self.stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                if isinstance(block, (DumbbellUnit, SemanticLayers)):
                    shares = block.assignment(x)[0]  # (H*W, Ns)
                    stages.append(soft_stage(number, shares, (x.shape[1], x.shape[2])))
                x, number = block(x), number + 1
        return stages

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
        unused = tuple(part for part in ("head.", "norm.") if not any(name.startswith(part) for name in own))
        if unused:
            dropped += [name for name, new in renamed.items() if new is not None and new.startswith(unused)]
            kept = {name: value for name, value in kept.items() if not name.startswith(unused)}
        if self.out_norms is not None and not any(name.startswith("out_norms.") for name in kept):
            kept |= {name: value for name, value in own.items() if name.startswith("out_norms.")}
        return {name: resized(value, name, self) for name, value in kept.items()}, dropped


def make_stem(stem: str, in_chans: int, dim: int, dd: Factory) -> nn.Module:
    """The stem of that name, for images of any size; a ValueError names any other."""
    if stem not in STEMS:
        raise ValueError(f"stem must be {' or '.join(map(repr, STEMS))}, got {stem!r}")
    if stem == "conv":
        return ConvStem(in_chans, dim, **dd)
    return PatchEmbed(None, 4, in_chans, dim, nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True, **dd)


def merging_stages(dims: Sequence[int], stages: Iterable[Sequence[nn.Module]], dd: Factory) -> nn.Sequential:
    """The stages of these blocks, all but the first opened by Swin's patch merging."""
    downs = (PatchMerging(dims[i - 1], **dd) if i else None for i in range(len(dims)))
    return nn.Sequential(*map(PyramidStage, downs, stages))


def check_windows(window_size: int | Sequence[int]) -> tuple[int, ...]:
    """One window side a stage of one for all, or of four; a TypeError or ValueError names any other value."""
    windows = (window_size,) * 4 if isinstance(window_size, int) else tuple(window_size)
    if len(windows) != 4:
        raise ValueError(f"window_size must be one side for all stages or one for each of the four, got {window_size}")
    return tuple(check_count("window_size", side, 1) for side in windows)


def check_kernels(kernels: Sequence[int] | None, key_windows: str, window: int, samples: int) -> tuple[int, ...]:
    """Sides of the key windows of STGM 1, STGM 2 and the recovery; a ValueError unless there is a use for them."""
    if kernels is None:
        return (2 * window, 3 * window, 9 * samples) if key_windows == "dense" else (window + 3,) * 3
    if key_windows != "dense":
        raise ValueError(f"kernels are the key windows of key_windows='dense', got {list(kernels)} for {key_windows!r}")
    if len(kernels) != 3:
        raise ValueError(f"kernels must be three sides (STGM 1, STGM 2, recovery), got {list(kernels)}")
    return tuple(check_count("kernels", side, 1) for side in kernels)


def check_third_stage(
    depths: Sequence[int], recovery: bool, key_windows: str, use_global: bool, relative_pos: bool
) -> None:
    """Raise a ValueError unless the third stage can be built of that many blocks, with key windows of that form."""
    check_key_windows(key_windows, use_global, relative_pos)
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


def resized(value: Tensor, name: str, model: STViTSwin) -> Tensor:
    """A position table of a file in the size the model has; any other weight as it is."""
    own = dict(model.named_parameters()).get(name)
    if own is None or value.shape == own.shape:
        return value
    if name.endswith(".relative_position_bias_table"):
        side, module = (math.isqrt(value.shape[0]) + 1) // 2, model.get_submodule(name.rpartition(".")[0])
        return resize_bias_table(value, (side, side), cast(Any, module).window_size)
    if name.endswith(".global_centres"):
        layers = model.get_submodule(name.removesuffix(".stgm2.global_centres"))
        return resample_abs_pos_embed(value, layers.grid, num_prefix_tokens=0)
    return value
