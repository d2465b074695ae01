"""Agreement with ALGM's official code: both merges alone, and segmenters that restore behind their decoder."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.dense.mask_transformer import MaskTransformer, restore_scores
from effvit.hosts.host import TokenFeatures
from effvit.reducers.algm import plan_global_merge, plan_local_merge
from effvit.reducers.merging import apply_merge
from effvit.tokens import TokenMap


def compare(case: Case) -> None:
    if "subcases" in case.config:
        compare_functions(case)
    else:
        compare_segmenter(case)


def places(tokens: TokenMap, former: TokenMap | None = None) -> Tensor:
    """(B, 1+N) official place of every token of the former map (or patch), the class token first."""
    source = tokens.source
    if former is not None:  # by the patch that each of its tokens keeps the place of
        source = source.gather(1, former.anchor)
    return F.pad(source + 1, (1, 0))


def compare_functions(case: Case) -> None:
    """The local merge of x, then the global one of what it gives, with the counts of the official batch."""
    for i, row in enumerate(case.config["subcases"]):
        x, key = case[f"s{i}/x"], f"s{i}"
        assert x.shape == (row["B"], 1 + row["grid"] ** 2, row["C"])
        tokens = TokenMap.full(x, (row["grid"], row["grid"]), num_prefix=1, num_class=1)
        merge = plan_local_merge(x[:, 1:], tokens, row["window"], row["threshold"], compat=True)
        assert int(merge.merged[0].sum()) == row["local_r"] * (row["window"] ** 2 - 1)
        x, local = apply_merge(x, tokens, merge, packed=False)
        close_with_size(case, x, local, f"{key}/local")
        case.equal(places(local), f"{key}/local_pos")
        merge = plan_global_merge(x[:, 1:], None, 1, row["layer"], compat=True)
        assert int(merge.merged[0].sum()) == row["global_r"]
        x, final = apply_merge(x, local, merge, packed=False)
        close_with_size(case, x, final, f"{key}/global")
        case.equal(places(final, local), f"{key}/global_pos")
        case.equal(places(final), f"{key}/group")


def close_with_size(case: Case, x: Tensor, tokens: TokenMap, key: str, tolerance: float = SINGLE) -> None:
    assert tokens.size is not None
    case.close(x, key, tolerance)
    case.close(tokens.size.unsqueeze(-1), f"{key}_size", tolerance)


class Linear(nn.Module):
    """Segmenter's ``DecoderLinear``: the head alone, restored behind it."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, num_classes)

    def forward(self, features: TokenFeatures) -> Tensor:
        x, tokens = features
        return restore_scores(self.head(x[:, tokens.num_prefix :]), tokens)


def compare_segmenter(case: Case) -> None:
    config = case.config
    case.evaluated()
    expect(config, window=[2, 2])
    dtype = case["input"].dtype
    tolerance = DOUBLE if dtype == torch.float64 else SINGLE
    state = case.state()
    host = VisionTransformer(
        img_size=config["img_size"],
        patch_size=config["patch"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        num_classes=config["num_classes"],
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
    ).to(dtype)
    host.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
    dim, classes = config["embed_dim"], config["num_classes"]
    depth = len({name.split(".")[2] for name in state if name.startswith("decoder.blocks.")})
    decoders = {"mask": partial(MaskTransformer, depth=depth, num_heads=config["num_heads"]), "linear": Linear}
    decoder = decoders[config["decoder"]](dim, classes).to(dtype).eval()
    decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")})

    layers = config["selected_layers"]
    settings = {"threshold": config["threshold"], "reduce_at": [layer - 1 for layer in layers]}
    model = effvit.sparsify(host, "algm", compat=True, **settings).eval()
    blocks = model.trace_tokens(case["input"])
    before, entered = None, 1 + model.patch_embed.num_patches
    for layer, merged, left in zip(layers, config["merged"], config["tokens_after"], strict=True):
        x, tokens = blocks[layer - 1]
        assert tokens.size is not None
        assert x.shape[1] == left == entered - merged * (3 if before is None else 1)
        case.close(x, f"layer{layer}/out", tolerance)
        case.close(tokens.size.unsqueeze(-1), f"layer{layer}/size", tolerance)
        case.equal(places(tokens, before), f"layer{layer}/pos")
        case.equal(places(tokens), f"layer{layer}/group")
        before, entered = tokens, left
    features = model.forward_tokens(case["input"])
    case.close(features.x, "features", tolerance)
    case.equal(places(features.tokens), "group")
    output = F.interpolate(decoder(features), size=case["input"].shape[2:], mode="bilinear")
    case.close(output, "output", tolerance)
    compare_images_alone(case, host, settings)


def compare_images_alone(case: Case, host: VisionTransformer, settings: dict[str, object]) -> None:
    """Without ``compat`` each image of the first block merges all windows above the threshold, as it does alone."""
    model = effvit.sparsify(host, "algm", **settings).eval()
    tokens = model.trace_tokens(case["input"])[0].tokens
    merged = [(model.patch_embed.num_patches - left) // 3 for left in tokens.counts().tolist()]
    assert merged == list(case.config["windows_above_threshold_per_image"])
    similar = case["local/similarity_f64"] >= case.config["threshold"]
    assert similar.sum(1).tolist() == merged
    for layer, counts in case.config["global_above_threshold_per_image"].items():
        reached = case[f"layer{layer}/best_f64"] >= case[f"layer{layer}/threshold_f64"]
        assert reached.sum(1).tolist() == list(counts)
