"""HoT against its official code: MixSTE built from timm's blocks and the two parts of this package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from effvit.recover import TokenRecoveringAttention, closeness
from effvit.reducers.density import density_peaks, peak_scores
from effvit.tokens import flat_rows, take_rows


class MixSTE(nn.Module):
    """hot_mixste.py ``Model``: spatial and temporal blocks in turn on (B, frames, joints, 2), pruned in time."""

    def __init__(
        self,
        channel: int = 512,
        frames: int = 243,
        token_num: int = 81,
        layer_index: int = 3,
        n_joints: int = 17,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        norm = partial(LayerNorm, eps=1e-6)
        self.Spatial_patch_to_embedding = nn.Linear(2, channel)
        self.Spatial_pos_embed = nn.Parameter(torch.zeros(1, n_joints, channel))
        self.Temporal_pos_embed = nn.Parameter(torch.zeros(1, frames, channel))
        self.pos_embed_token = nn.Parameter(torch.zeros(1, token_num, channel))
        for name in ("STEblocks", "TTEblocks"):
            blocks = [Block(channel, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
            self.add_module(name, nn.ModuleList(blocks))
        self.Spatial_norm, self.Temporal_norm = norm(channel), norm(channel)
        self.cross_attention = TokenRecoveringAttention(channel, frames, num_heads, zero_init=True)
        self.head = nn.Sequential(nn.LayerNorm(channel), nn.Linear(channel, 3))

    def forward(self, poses: Tensor, index: Tensor) -> dict[str, Tensor]:
        """All that the cases record, for a choice of frames (B, K)."""
        found: dict[str, Tensor] = {}
        batch, _, joints, _ = poses.shape
        x = self.Spatial_patch_to_embedding(poses) + self.Spatial_pos_embed  # (B, F, J, C)
        for i, (spatial, temporal) in enumerate(zip(self.STEblocks, self.TTEblocks, strict=True)):
            if i == self.layer_index:
                found["inter/pooled"] = x.mean(2)
                x = take_rows(x.flatten(2), flat_rows(index, x.shape[1])).unflatten(2, (joints, -1))
                x = x + self.pos_embed_token.unsqueeze(2)
            x = self.Spatial_norm(spatial(x.flatten(0, 1))).unflatten(0, (batch, -1))
            x = x.transpose(1, 2).flatten(0, 1)  # (B * J, F, C)
            x = x + self.Temporal_pos_embed if i == 0 else x
            x = self.Temporal_norm(temporal(x)).unflatten(0, (batch, joints)).transpose(1, 2)
        kept = x.transpose(1, 2).flatten(0, 1)  # (B * J, K, C)
        recovered = self.cross_attention(kept)
        found["inter/pruned_tokens"] = kept
        found["inter/cross_attention_out"] = recovered - self.cross_attention.x_token
        found["output"] = self.head(recovered).unflatten(0, (batch, joints)).transpose(1, 2)
        return found


def own_names(state: dict[str, Any]) -> dict[str, Any]:
    """Official parameter names -> ours: the learned queries belong to the attention here."""
    return {("cross_attention.x_token" if key == "x_token" else key): value for key, value in state.items()}


def compare(case: Case) -> None:
    config, dtype, pooled = case.config["config"], case["input"].dtype, case["inter/pooled"]
    case.evaluated()
    expect(config, cls="mixste.hot_mixste.Model")
    limit = DOUBLE if dtype == torch.float64 else SINGLE
    # The last bits of the distances decide between frames that are nearest to each other: from recorded features.
    index = compare_clusters(case, pooled, config["kwargs"].get("token_num", 81), config.get("k", 2))
    model = MixSTE(**config["kwargs"]).to(dtype).eval()
    model.load_state_dict(own_names(case.state()))
    with torch.no_grad():
        found = model(case["input"], index)
    for key in (key for key in case.tensors if key in found):
        case.close(found[key], key, limit)


def compare_clusters(case: Case, pooled: Tensor, number: int, k: int) -> Tensor:
    """The official centres are in falling order of score, ours in time; assignments are compared as frames."""
    case.equal(peak_scores(pooled, k, compat=True).topk(number).indices, "inter/index_down")
    index = density_peaks(pooled, number, k, compat=True)
    assert torch.equal(index, case["inter/index_down"].sort(-1).values)
    nearest = closeness(pooled, pooled.gather(1, index.unsqueeze(-1).expand(-1, -1, pooled.shape[-1])), 1.0).argmax(-1)
    nearest = nearest.scatter(1, index, torch.arange(number).expand_as(index))  # every peak to itself
    frames = index.gather(1, nearest)
    assert torch.equal(frames, case["inter/index_down"].gather(1, case["inter/idx_cluster"]))
    return index


def compare_keys(_: Path, content: dict[str, Any]) -> None:
    with torch.device("meta"):
        own = {name: list(value.shape) for name, value in MixSTE().state_dict().items()}
    assert own == {name: shape for name, (_, shape) in own_names(content["keys"]).items()}
    assert sum(torch.Size(shape).numel() for shape in own.values()) == content["n_params"]
