"""Selectors against recordings of their official code, which are given tokens, and for two methods a whole tower."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import DOUBLE, SINGLE, Case, expect
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.selectors import QueryPooler, Selection
from effvit.selectors.aim import AIM, merge_round, rounds_to
from effvit.selectors.cdpruner import determinant_order, relevance_to_text
from effvit.selectors.globalcom2 import crop_ratios
from effvit.selectors.hired import share_budget
from effvit.selectors.holitom import static_windows
from effvit.selectors.matryoshka import pool_windows, stride_for
from effvit.selectors.neighbours import add_neighbours
from effvit.selectors.parts import valid_cells
from effvit.selectors.prumerge import num_outliers
from effvit.selectors.recoverable import OF_ALL, OF_REST, OUTLYING, recover_image
from effvit.selectors.spread import cosines_of, isolated, spread


def sizes(case: Case, tokens: Tensor, prefix: int = 0) -> tuple[int, int]:
    """(H, W) grid of the recorded tokens, whose sizes must be those of the configuration."""
    config = case.config
    expect(config, checked=True, dtype=str(tokens.dtype).removeprefix("torch."))
    expect(config, num_patches=tokens.shape[-2] - prefix, channels=tokens.shape[-1])
    number = tokens.shape[-2] - prefix
    side = int(number**0.5)
    return (side, side) if side * side == number else (1, number)


def tolerance(tokens: Tensor) -> float:
    return DOUBLE if tokens.dtype == torch.float64 else SINGLE


def tower(case: Case, **blocks: int) -> VisionTransformer:
    config = case.config["tower"]
    expect(config, **blocks)
    model = VisionTransformer(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        class_token=config["class_token"],
        norm_layer=partial(nn.LayerNorm, eps=config["norm_eps"]),
        num_classes=0,
    )
    missing, unexpected = model.load_state_dict(case.state(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} <= {"norm", "fc_norm"}, "the tokens leave in front of the norm"
    return model.eval()


def compare_visionzip(case: Case) -> None:
    config, x = case.config, case["tokens"]
    grid = sizes(case, x, prefix=1)
    expect(config, heads=case["keys"].shape[1], head_dim=case["keys"].shape[3])
    dominant, contextual = config["dominant"], config["contextual"]
    choose = partial(effvit.select_tokens, method="visionzip", keep=dominant + contextual, contextual=contextual)
    keys = case["keys"].mean(dim=1)[:, 1:]
    case.near(case["keys"].mean(dim=1), case["metric"], "metric", tolerance(x))
    scores = case["class_attention"].sum(dim=1)
    chosen = [choose(None, None, tokens=x[:, 1:], grid=grid, scores=scores, keys=keys)]
    if "tower" in config:
        with torch.no_grad():
            chosen.append(choose(tower(case, block=-2), case["input"]))
        prefix = chosen[1].prefix
        assert prefix is not None
        case.near(prefix, x[:, :1], "class token of the tower")
    for selection in chosen:
        compare_dominant_and_contextual(case, selection, x)


def compare_dominant_and_contextual(case: Case, selection: Selection, x: Tensor) -> None:
    """The release puts the class token first, then dominant tokens in image order, then contextual ones by target."""
    official = torch.cat([case["dominant"], case["target"]], dim=1)
    order = official.argsort(dim=1)
    assert torch.equal(selection.ids, official.gather(1, order))
    assert torch.equal(selection.ids, torch.cat([case["official_ids"][:, 1:] - 1, case["target"]], 1).sort(1).values)
    tokens = torch.cat(
        [x[:, :1], selection.tokens.gather(1, order.argsort(1).unsqueeze(-1).expand_as(selection.tokens))], 1
    )
    case.close(tokens, "output", tolerance(x))
    assert selection.group is not None
    case.equal(order.gather(1, selection.group), "group")


def compare_divprune(case: Case) -> None:
    x, config = case["tokens"], case.config
    grid = sizes(case, x)
    kept = config["keep"]
    cosines = cosines_of(x, kept)
    order, far = spread(cosines, isolated(cosines), kept)
    case.equal(order, "order")
    case.near(far[:, 1:], case["distance"][:, 1:], "distance", 2 * tolerance(x))
    selection = effvit.select_tokens(None, None, "divprune", keep=config["ratio"], tokens=x, grid=grid)
    case.equal(selection.ids, "kept")
    assert effvit.count_tokens("divprune", grid, keep=config["ratio"]) == kept


def compare_cdpruner(case: Case) -> None:
    x, config = case["tokens"], case.config
    grid, kept = sizes(case, x), config["keep"]
    expect(config, text_embeds=len(case["text_embeds"]) if "text_embeds" in case else 0)
    relevance = case["relevance"].to(x.dtype) if "relevance" in case else None
    if "image_embeds" in case:
        relevance = relevance_to_text(case["image_embeds"], case["text_embeds"])
        case.near(relevance, case["relevance"], "relevance")
        differs = any(set(a.tolist()) != set(b.tolist()) for a, b in zip(case["kept"], case["batch_kept"], strict=True))
        assert config["batch_differs"] == differs, "where the release lets an image depend on its neighbours"
    order, gain = determinant_order(x, kept, relevance)
    case.equal(order, "order")
    case.near(gain, case["gain"], "gain", tolerance(x))
    selection = effvit.select_tokens(None, None, "cdpruner", keep=kept, tokens=x, grid=grid, relevance=relevance)
    case.equal(selection.ids, "kept")


def compare_prumerge(case: Case) -> None:
    x, config = case["tokens"], case.config
    grid = sizes(case, x, prefix=1)
    scores = torch.stack([one_head_row(q, k) for q, k in zip(case["q"], case["k"], strict=True)])
    case.near(scores, case["class_attention"], "class_attention")
    method = "prumerge_plus" if config["plus"] else "prumerge"
    choose: Callable[..., Selection] = partial(effvit.select_tokens, method=method, neighbours=config["neighbours"])
    if config["adaptive"]:
        assert config["ratio"] is None
        keep = None
    else:
        keep = (1 + config["plus"]) * int(config["ratio"] * scores.shape[1]) + 1  # PruMerge+ has as many again
    given: dict[str, Any] = {"grid": grid, "scores": scores, "keys": case["k"][:, 1:], "keep": keep}
    for number in range(len(x)):
        one = {
            name: value[number : number + 1] if isinstance(value, Tensor) else value for name, value in given.items()
        }
        compare_merged(case, choose(None, None, tokens=x[number : number + 1, 1:], **one), number, x)
    together = choose(None, None, tokens=x[:, 1:], **given)
    for number in range(len(x)):
        compare_merged(case, image_of(together, number), number, x)
    outliers = num_outliers(scores) if config["adaptive"] else case["num_outliers"]
    case.equal(outliers, "num_outliers")
    assert config["num_outliers"] == outliers.tolist()
    if "tower" in config:
        with torch.no_grad():
            of_tower = choose(tower(case, tokens_of_block=-2, q_k_of_block=-1), case["input"], keep=keep)
        for number in range(len(x)):
            compare_merged(case, image_of(of_tower, number), number, x)


def image_of(selection: Selection, number: int) -> Selection:
    """The tokens and ids of one image, without padding."""
    count = int(selection.counts[number])
    ids, tokens = selection.ids[number : number + 1, :count], selection.tokens[number : number + 1, :count]
    return selection._replace(tokens=tokens, ids=ids)


def compare_merged(case: Case, selection: Selection, number: int, x: Tensor) -> None:
    """One image: the kept tokens in the release's order, and the one token of all others behind them."""
    ids, output = case[f"image{number}/ids"], case[f"image{number}/output"]
    assert case.config["num_kept"][number] == len(ids)
    scores, keys = case["class_attention"][number : number + 1], case["k"][number : number + 1, 1:]
    patches, neighbours = x[number : number + 1, 1:], case.config["neighbours"]
    near = add_neighbours(patches, keys, scores.to(x.dtype), ids.unsqueeze(0), neighbours)[0]
    members = case[f"image{number}/members"]
    if len(ids.unique()) < len(ids):
        compare_doubled(case, near, members, ids, output)
        assert set(ids.tolist()) <= set(selection.ids[0].tolist())
        return
    weight = torch.zeros(len(ids), patches.shape[1], dtype=torch.float64)
    weight = weight.scatter(1, members, scores.expand(len(ids), -1).gather(1, members))
    case.near(near, patches[0, ids] + (weight @ patches[0].double()).to(x.dtype), "members")
    places = {cell: place for place, cell in enumerate(selection.ids[0].tolist())}
    order = [places.pop(cell) for cell in ids.tolist()]
    (rest,) = places.values()
    case.near(selection.tokens[0, [*order, rest]], output, f"image{number}/output")


def compare_doubled(case: Case, near: Tensor, members: Tensor, ids: Tensor, output: Tensor) -> None:
    """ "For training" PruMerge+ chooses patches twice, adds these twice, and forgets as many of the first ones.

    Ours chooses others in their place, so only kept tokens that neither touches are comparable.
    """
    assert case.config["plus"]
    assert not case.config["adaptive"]
    doubled = [cell for cell in ids.unique().tolist() if (ids == cell).sum() > 1]
    touched = torch.isin(members, torch.tensor(doubled)).any(1) | torch.isin(ids, torch.tensor(doubled))
    unit = F.normalize(case["k"][0, 1:].double(), dim=-1)
    similarity = (unit[ids] @ unit.T).scatter(1, ids.unsqueeze(1), -2)
    forgotten = similarity.topk(case.config["neighbours"]).indices < len(doubled)
    same = ~(touched | forgotten.any(1))
    assert same.sum() > len(ids) / 4
    case.near(near[same], output[:-1][same], "image0/output")


def compare_todre(case: Case) -> None:
    x, config = case["tokens"], case.config
    grid, kept, scores = sizes(case, x), config["keep"], case["class_attention"]
    for version, name in (("v1", "k_center"), ("v2", "max_sum")):
        order, _ = spread(cosines_of(x, kept), scores.argmax(1, keepdim=True), kept, total=version == "v2")
        case.equal(order, f"{name}/order")
        selection = effvit.select_tokens(
            None, None, "todre", keep=kept, version=version, tokens=x, grid=grid, scores=scores
        )
        case.equal(selection.ids, f"{name}/kept")


def compare_aim(case: Case) -> None:
    x, config = case["tokens"], case.config
    grid = sizes(case, x)
    y = x
    for number, (r, count) in enumerate(zip(config["r"], config["counts"], strict=True)):
        tokens = merge_round(y, r).tokens
        assert tokens is not None
        case.close(tokens, f"round{number}", tolerance(x))
        assert tokens.shape[1] == count
        y = tokens
    kept = config["counts"][-1]
    assert rounds_to(kept, x.shape[1]) == config["r"]
    selection = effvit.select_tokens(None, None, "aim", keep=kept, tokens=x, grid=grid)
    choice = AIM().choose(effvit.selectors.Features(x, grid), kept)
    assert choice.group is not None
    case.equal(choice.group, "group")
    order = choice.ids.argsort(1)
    case.near(selection.tokens, case["output"].gather(1, order.unsqueeze(-1).expand_as(selection.tokens)), "output")


def compare_matryoshka(case: Case) -> None:
    x, config = case["tokens"], case.config
    grid = sizes(case, x)
    for scale in config["scales"]:
        asked, k = scale["asked"], stride_for(scale["asked"], x.shape[1])
        pooled, window = pool_windows(x, grid, k)
        case.close(pooled, f"s{asked}/output")
        case.equal(window, f"s{asked}/group")
        assert (k, pooled.shape[1]) == (scale["kernel"], scale["got"])
        assert (window < 0).sum() == scale["lost_patches"]
        if not scale["lost_patches"]:
            selection = effvit.select_tokens(None, None, "matryoshka", keep=asked, tokens=x, grid=grid)
            case.close(selection.tokens, f"s{asked}/output")


def compare_recoverable(case: Case) -> None:
    """The release compares by the keys of other patches; recorded beside it is what the right ones give."""
    x, config = case["tokens"], case.config
    grid = sizes(case, x, prefix=1)
    expect(config, function="token_recycling_with_text_in_vision_and_clustring", lof_k=[OF_ALL, OF_ALL, OF_REST])
    expect(config, lof_threshold=OUTLYING)
    patches, keys, scores = x[1:], case["k"][1:], case["class_attention"]
    case.near(one_head_row(case["q"], case["k"]), scores, "class_attention")
    image = recover_image(patches, scores, keys, case["similarity"].double(), config["neighbours"])
    centres = image.ids[image.num_kept : image.num_kept + image.num_centres]
    case.equal(image.ids[: image.num_kept], "kept")
    case.equal(centres, "centres")
    case.close(image.tokens, "output_right_keys")
    assert (image.num_kept, image.num_centres) == (
        config["num_by_attention"] + config["num_by_text"],
        config["num_centres"],
    )
    selection = effvit.select_tokens(
        None,
        None,
        "recoverable",
        neighbours=config["neighbours"],
        tokens=patches.unsqueeze(0),
        grid=grid,
        scores=scores.unsqueeze(0),
        keys=keys.unsqueeze(0),
        relevance=case["similarity"].unsqueeze(0),
    )
    case.near(selection.tokens[0], case["output_right_keys"][image.ids.argsort()], "output_right_keys")


def one_head_row(q: Tensor, k: Tensor) -> Tensor:
    """Class attention (N,) of projections (1+N, C), all heads as one."""
    q, k = q.double(), k.double()
    return ((q[:1] @ k.T) * q.shape[-1] ** -0.5).softmax(-1)[0, 1:]


def compare_llava_mini(case: Case) -> None:
    x, config = case["tokens"], case.config
    expect(config, checked=True, dtype=str(x.dtype).removeprefix("torch."), num_patches=x.shape[1])
    expect(config, in_channels=x.shape[2], gradient="loss = output.square().sum()" if "grad_input" in case else None)
    side, g = int(x.shape[1] ** 0.5), config["grid_size"]
    pooler = QueryPooler(
        config["channels"], grid_size=g, num_heads=config["num_heads"], in_dim=config["in_channels"]
    ).to(x.dtype)
    case.near(pooler.pos_embed, case["state/pos_embed"], "pos_embed")
    pooler.load_state_dict(case.state())
    x = x.clone().requires_grad_()
    selection = effvit.select_tokens(None, None, pooler, tokens=x, grid=(side, side))
    case.close(selection.tokens, "output")
    out, attention = pooler.attend(x, (side, side))
    case.close(out, "output")
    case.close(attention, "attention")
    if "grad_input" in case:
        selection.tokens.square().sum().backward()
        for name, parameter in pooler.named_parameters():
            assert parameter.grad is not None
            case.close(parameter.grad, f"grad/{name}")
        assert x.grad is not None
        case.close(x.grad, "grad_input")


def compare_hired(case: Case) -> None:
    """The mask of the right squares; the release's strips are the same for one column of crops."""
    config, early, late = case.config, case["top_attention"].sum(1), case["bottom_attention"].sum(1)
    crops, grid = (config["crop_rows"], config["crop_cols"]), (config["side"], config["side"])
    expect(config, checked=True, dtype=str(early.dtype).removeprefix("torch."), num_patches=early.shape[1])
    expect(config, heads=case["top_attention"].shape[1])
    total = int(early.numel() * config["token_budget_rate"])
    assert total == config["budget"]
    shared = share_budget(early[0], grid, crops, total, config["alpha"])
    case.equal(shared, "counts")
    counts = shared.tolist()
    assert sum(counts) == config["kept"]
    assert config["kept_official"] == case["official_counts"].sum()
    if crops[1] == 1:
        case.equal(shared, "official_counts")
    exact = share_budget(early[0], grid, crops, total, config["alpha"], exact=True).tolist()
    assert sum(exact) == min(total, early.numel())
    assert all(0 <= more - few <= 1 for few, more in zip(counts, exact, strict=True)) or max(counts) == early.shape[1]
    given = {"crops": crops, "tokens": late.unsqueeze(-1), "grid": grid, "scores": late, "early": early}
    selected = effvit.select_parts(
        None, None, "hired", keep=config["token_budget_rate"], alpha=config["alpha"], **given
    )
    case.equal(selected.selection.mask(), "mask")


def compare_globalcom2(case: Case) -> None:
    config, x, scores = case.config, case["tokens"], case["score"]
    crops, grid = (config["crop_rows"], config["crop_cols"]), (config["side"], config["side"])
    expect(config, checked=True, dtype=str(x.dtype).removeprefix("torch."), num_patches=x.shape[1], channels=x.shape[2])
    size = (config["image_height"], config["image_width"])
    case.equal(valid_cells(size, crops, grid), "valid")
    ratio = config["retention_ratio"]
    case.close(crop_ratios(scores[0], grid, crops, ratio), "scales", 1e-6)
    selected = effvit.select_parts(
        None, None, "globalcom2", keep=ratio, crops=crops, image_size=size, tokens=x, grid=grid, scores=scores
    )
    mask = selected.selection.mask()
    case.equal(mask[1:], "mask")
    case.equal(selected.selection.counts[1:], "counts")
    assert mask[0].nonzero().flatten().tolist() == case["thumbnail_ids"].sort().values.tolist()
    canvas = selected.canvas_ids()[1:]
    order = canvas[canvas >= 0].argsort()
    tokens = selected.selection.tokens[1:][canvas >= 0][order]
    row = canvas[canvas >= 0][order] // (crops[1] * grid[1])
    newline = torch.full_like(x[0, :1], 7)
    lines = [torch.cat([tokens[row == number], newline]) for number in range(crops[0] * grid[0])]
    in_order = torch.equal(torch.cat(lines).half(), case["official_output"])
    assert in_order == config["official_output_is_mask_in_image_order"]


def compare_holitom(case: Case) -> None:
    config, x = case.config, case["tokens"]
    grid = sizes(case, x)
    expect(config, frames=len(x), D=0.0)  # the only value that the release can run
    unit = F.normalize(x, dim=-1)
    similarity = (unit[1:] * unit[:-1]).sum(-1)
    case.close(similarity, "similarity")
    windows = static_windows(similarity > config["tau"], config["max_window_size"])
    case.equal(torch.tensor(windows.spans), "windows")
    assert (len(windows.spans), windows.saved) == (config["num_windows"], config["total_reduced"])
    assert config["retain_ratio"] / (1 - windows.saved / case["attention"].numel()) == pytest.approx(
        config["ratio_after_static"]
    )
    settings = {"tau": config["tau"], "beta": config["beta"], "k": config["K"], "longest": config["max_window_size"]}
    selection = effvit.select_video(
        None, None, keep=config["retain_ratio"], tokens=x, grid=grid, scores=case["attention"], **settings
    )
    places = {cell: place for place, cell in enumerate(selection.ids[0].tolist())}
    cells = x.shape[1]
    for number, (first, last) in enumerate(windows.spans):
        static = [first * cells + place for place in case[f"window{number}/static_pos"].flatten().tolist()]
        moving = [
            frame * cells + place
            for frame, kept in zip(range(first, last + 1), case[f"window{number}/dynamic_pos"].tolist(), strict=True)
            for place in kept
        ]
        order = [places.pop(cell) for cell in (*static, *moving)]
        expected = [case[f"window{number}/{kind}"].flatten(0, 1) for kind in ("static", "dynamic")]
        case.near(selection.tokens[0, order], torch.cat(expected), f"window{number}")
    assert not places


COMPARE: dict[str, Callable[[Case], None]] = {
    "visionzip": compare_visionzip,
    "divprune": compare_divprune,
    "cdpruner": compare_cdpruner,
    "prumerge": compare_prumerge,
    "todre": compare_todre,
    "aim": compare_aim,
    "matryoshka": compare_matryoshka,
    "recoverable": compare_recoverable,
    "llava_mini": compare_llava_mini,
    "hired": compare_hired,
    "globalcom2": compare_globalcom2,
    "holitom": compare_holitom,
}
