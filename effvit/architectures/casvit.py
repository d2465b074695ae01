"""CAS-ViT: convolutional additive self-attention (arXiv 2408.03703). It keeps all tokens; its mixer is linear in them.

Queries and keys each pass a spatial and a channel gate, are added, convolved depthwise and multiplied with the
values: no softmax and no product of all pairs of pixels. Facts from Tianfang-Zhang/CAS-ViT@041d2d6
(classification/model/rcvit.py), whose class is called RCViT.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import ClassifierHead, ConvNormAct, DropPath, Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from effvit.architectures.base import (
    ChannelsLastStem,
    PyramidBackbone,
    check_per_stage,
    conv_stage_terms,
    conv_stages,
    pooled_head,
)
from effvit.hosts._names import renamed
from effvit.layers.macs import Terms, feedforward, layers, norm
from effvit.protocols import Device, Factory, Size

__all__ = ["AdditiveAttention", "CASViT", "DistilledHead"]


class Gates(nn.Module):
    """A spatial and then a channel gate on a map (B, C, H, W).

    The first multiplies every pixel by the sigmoid of one number that its 3 x 3 surroundings give, the second every
    channel by the sigmoid of one number that the means of all channels give.
    """

    def __init__(self, dim: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}
        self.spatial = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.ReLU(),
            nn.Conv2d(dim, 1, 1, bias=False, **dd),
            nn.Sigmoid(),
        )
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, dim, 1, bias=False, **dd),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        place: Tensor = self.spatial(x)  # (B, 1, H, W)
        x = x * place
        channel: Tensor = self.channel(x)  # (B, C, 1, 1)
        return x * channel


class AdditiveAttention(nn.Module):
    """proj(dwconv(gates(q) + gates(k)) * v) (2408.03703); maps (B, C, H, W).

    Args:
        dim: Channels.
        qkv_bias: Biases of q, k and v.
        proj_drop: Dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias, **dd)
        self.gates_q, self.gates_k = Gates(dim, **dd), Gates(dim, **dd)
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(x)  # (B, 3C, H, W)
        q, k, v = qkv.chunk(3, dim=1)  # (B, C, H, W) each
        gated: Tensor = self.gates_q(q) + self.gates_k(k)
        y: Tensor = self.dwconv(gated) * v
        y = self.proj_drop(self.proj(y))
        return y


class CASBlock(nn.Module):
    """Local convolutions, additive attention and MLP, each with a residual; maps (B, C, H, W).

    Args:
        dim: Channels.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        qkv_bias: Biases of q, k and v.
        proj_drop: Dropout of attention output and MLP.
        drop_path: Rate of stochastic depth of attention and MLP, not of the local branch.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: Factory = {"device": device, "dtype": dtype}
        self.local = nn.Sequential(
            nn.Conv2d(dim, dim, 1, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, **dd),
        )
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = AdditiveAttention(dim, qkv_bias, proj_drop, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.mlp: nn.Module = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, use_conv=True, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.local(x)
        x = x + y
        y = self.drop_path1(self.attn(self.norm1(x)))
        x = x + y
        y = self.drop_path2(self.mlp(self.norm2(x)))
        return x + y

    def closed_form(self, size: Size) -> Terms:
        """MACs by term on a map (H, W)."""
        pixels, attn = size[0] * size[1], self.attn
        terms = layers("local", self.local, pixels) + norm(self.norm1, pixels)
        for part in (attn.qkv, attn.gates_q.spatial, attn.gates_k.spatial, attn.dwconv, attn.proj):
            terms += layers("attention", part, pixels)
        for gates in (attn.gates_q, attn.gates_k):
            terms += layers("attention", gates.channel, 1)
            terms["pooling"] += pixels * attn.proj.in_channels
        return terms + feedforward(self, pixels)


class DistilledHead(ClassifierHead):
    """timm's classifier head with a second classifier for distillation.

    In eval mode the mean of both; in training the pair of both, unless ``distilled_training`` is False.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.distilled_training = True
        self.fc_dist = self._twin()

    def _twin(self) -> nn.Module:
        """A new classifier like ``fc``, which has just been made: linear, or nothing for no classes."""
        if isinstance(self.fc, nn.Identity):
            return nn.Identity().train(self.training)
        weight = self.fc.weight
        twin = nn.Linear(self.fc.in_features, self.fc.out_features, device=weight.device, dtype=weight.dtype)
        return twin.train(self.training)

    def reset(self, *args: object, **kwargs: object) -> None:
        super().reset(*args, **kwargs)
        self.fc_dist = self._twin()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = super().forward(x, pre_logits=True)
        if pre_logits or isinstance(self.fc, nn.Identity):  # any other module is a classifier, wrapped or quantised
            return x
        scores: Tensor = self.fc(x)
        distilled: Tensor = self.fc_dist(x)
        mean = (scores + distilled) / 2  # in training too: torch.fx then records the same nodes for both modes
        return (scores, distilled) if self.training and self.distilled_training else mean


# Official names, in order of application. The numbers of ``network`` alternate between stages and downsampling.
RENAMED = (
    (r"^patch_embed\.0\.", "stem.0.conv."),
    (r"^patch_embed\.1\.", "stem.0.bn."),
    (r"^patch_embed\.3\.", "stem.1.conv."),
    (r"^patch_embed\.4\.", "stem.1.bn."),
    (r"^network\.([135])\.proj\.", r"network.\1.downsample.conv."),
    (r"^network\.([135])\.norm\.", r"network.\1.downsample.bn."),
    (r"^network\.([0246])\.(\d+)\.", r"network.\1.blocks.\2."),
    (r"^network\.(\d)\.", lambda match: f"stages.{(int(match[1]) + 1) // 2}."),
    (r"\.local_perception\.network\.", ".local."),
    (r"\.attn\.oper_([qk])\.0\.block\.", r".attn.gates_\1.spatial."),
    (r"\.attn\.oper_([qk])\.1\.block\.", r".attn.gates_\1.channel."),
    (r"\.attn\.dwc\.", ".attn.dwconv."),
    (r"^norm([0246])\.", lambda match: f"out_norms.{int(match[1]) // 2}."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^dist_head\.", "head.fc_dist."),
)


class CASViT(PyramidBackbone):
    """CAS-ViT (2408.03703) for images of any size.

    Args:
        num_classes: Classes; 0 for none.
        global_pool: timm's pooling in front of the classifier.
        in_chans: Channels of the images.
        dims: Channels of the four stages.
        depths: Blocks of the stages.
        mlp_ratio: Hidden channels of the MLPs over the stage's.
        qkv_bias: Biases of q, k and v.
        distilled: Have a second classifier, as all released models do: in training the model returns the scores of
            both, otherwise their mean.
        drop_rate: Dropout in front of the classifier.
        proj_drop_rate: Dropout of attention output and MLP (officially ``drop_rate``).
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        out_norm: Give every stage's map a BatchNorm, as in the official detectors; the map that goes on to the next
            stage is not normalised.

    Raises:
        ValueError: Lists of different lengths.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        global_pool: str = "avg",
        in_chans: int = 3,
        dims: Sequence[int] = (48, 56, 112, 220),
        depths: Sequence[int] = (2, 2, 4, 2),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        distilled: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_norm: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: Factory = {"device": device, "dtype": dtype}
        check_per_stage(len(dims), depths=depths)
        super().__init__(
            dims,
            num_classes,
            global_pool,
            in_chans,
            drop_rate=drop_rate,
            out_norm=(lambda dim: nn.BatchNorm2d(dim, **dd)) if out_norm else None,
            **dd,
        )
        self.stem = ChannelsLastStem(
            ConvNormAct(in_chans, dims[0] // 2, 3, stride=2, bias=True, **dd),
            ConvNormAct(dims[0] // 2, dims[0], 3, stride=2, bias=True, **dd),
        )
        rates: list[list[float]] = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def make_blocks(i: int) -> list[nn.Module]:
            return [CASBlock(dims[i], mlp_ratio, qkv_bias, proj_drop_rate, rate, **dd) for rate in rates[i]]

        self.stages = conv_stages(dims, make_blocks, **dd)
        self.norm: nn.Module = nn.BatchNorm2d(dims[-1], **dd)
        if distilled:
            self.head = DistilledHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.init_weights(needs_reset=False)

    def _finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _prune_final(self) -> None:
        self.norm = nn.Identity()

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training mode returns the scores of both classifiers, or their mean as in eval mode (timm's name).

        Raises:
            ValueError: The model has one classifier.
        """
        if not isinstance(self.head, DistilledHead):
            raise ValueError("this CASViT has one classifier; create it with distilled=True")
        self.head.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:  # type: ignore[override]  # a pair
        """The classifier, or with distillation the pair of both."""
        return (self.head.fc, self.head.fc_dist) if isinstance(self.head, DistilledHead) else self.head.fc

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term: gates and depthwise convolutions in place of the attention map."""
        terms, size = conv_stage_terms(self.stem, self.stages, size)
        return terms + norm(self.norm, size[0] * size[1]) + pooled_head(self.head, size)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Official weights, of classifiers and of detectors' backbones, under our names, and the names dropped.

        Nothing is dropped but what lies behind the stages of a model without it.
        """
        adapted = {renamed(name, RENAMED): value for name, value in state.items()}
        unused = self.pruned_names(adapted)
        return {name: value for name, value in adapted.items() if name not in unused}, unused
