"""Selection behind vision towers: ``select_tokens``, its module for export, and how many tokens it leaves."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effvit.hosts.host import ReducedHost
from effvit.hosts.naflex import Images
from effvit.hosts.stages import Stage, map_stage
from effvit.hosts.surface import grid_of
from effvit.hosts.tower_exit import KEYS, RECEIVED, ROWS, Read, Tower, TowerOutput, leaving_block, tower_host
from effvit.layers.macs import Terms
from effvit.protocols import PatchEmbedding, Setting, Settings, Size
from effvit.recording import is_recorded
from effvit.reducers.base import check_bounded, check_distinct, check_finite, check_group, refuse_recording
from effvit.schedule import check_choice, check_count, check_number
from effvit.selectors.base import Choice, Features, Keep, SelectionSizes, Selector, rows_of
from effvit.selectors.cells import cell_grid, cell_means, check_sides, to_cells
from effvit.selectors.registry import SELECTORS, make_selector
from effvit.selectors.selection import Selection
from effvit.tokens import TokenMap, wide_dtype, widened

__all__ = [
    "SelectingTower",
    "TokenSelector",
    "arranged",
    "check_features",
    "check_tensor",
    "choose_tokens",
    "count_tokens",
    "features_of",
    "select_tokens",
]

CLASS_ROW = "class"


def select_tokens(
    tower: nn.Module | None,
    images: Images | None,
    method: str | Selector,
    *,
    keep: Keep = None,
    block: int | None = None,
    merge: int | None = None,
    tokens: Tensor | None = None,
    grid: Size | None = None,
    scores: Tensor | str = CLASS_ROW,
    keys: Tensor | None = None,
    relevance: Tensor | None = None,
    max_norm: float | None = None,
    **settings: Setting,
) -> Selection:
    """The tokens of a vision tower that a language model or a head is to see, chosen image by image.

    Args:
        tower: A timm model that ``sparsify`` takes, or one that is reduced already where the scores are those of the
            tokens that leave. None where they are given as ``tokens``.
        images: (B, 3, H, W); None with ``tokens``. Of a NaFlexVit also a dict of patches, of images of one grid.
        method: One of ``effvit.list_selectors()``, or a selector.
        keep: How many tokens leave: a number, or a share of the cells in (0, 1], rounded as in the method's code.
        block: Whose output leaves the tower, not normalised. None: -2 as in LLaVA, and the last one of a tower that
            has a projector of its own. Blocks behind it are not run but for a method that reads the last one, of which
            its attention's queries and keys are computed alone.
        merge: Side of the cells, in patches, that a merger behind the tower makes one token of. Whole cells are chosen,
            by the mean of their scores, and leave as rows of merge^2 * C channels. None: the tower's own if it has a
            projector (Qwen3, DeepSeek, Gemma 4 of timm), whose tokens are those that leave; else 1.
        tokens: (B, N, C) features of the full grid in place of a tower, merged already or with ``merge``, without
            prefix tokens.
        grid: (H, W) patches of ``tokens``.
        scores: "class": the attention of the class token, as the method reads it; "received": the mean attention each
            patch gets, for towers without one, at the cost of a second softmax map, formed in pieces. Beside
            ``tokens`` (B, N) of your own, where larger means that a patch matters more.
        keys: (B, N, D) keys for ``tokens``, for a method that compares them.
        relevance: (B, N) how much each patch has to do with a text, for CDPruner and Recoverable Compression alone.
        max_norm: Patches whose tokens have a larger norm, in front of a projector if there is one, rank last, and so do
            cells that hold one. Some patches of large ViTs without registers hold no content of their own but draw
            attention (2309.16588, which takes 150 for DINOv2).
        settings: Settings of the method.

    Returns:
        The Selection. All tokens, bit for bit, if as many are kept as there are.

    Raises:
        ValueError: A number of tokens that the method cannot give; something it needs and did not get, or
            got and does not use; NaN.
        TypeError: A tower that ``sparsify`` does not take, or both or neither of a tower and tokens.
    """
    selector = make_selector(method, settings)
    refuse_elsewhere(selector)
    features, of_map, prefix = features_of(
        selector,
        tower,
        images,
        keep=keep,
        block=block,
        merge=merge,
        max_norm=max_norm,
        tokens=tokens,
        grid=grid,
        scores=scores,
        keys=keys,
        relevance=relevance,
    )
    return choose_tokens(selector, features, keep, of_map, prefix)


class TowerFeatures(NamedTuple):
    """What a selector may choose by, and what goes around it.

    Attributes:
        features: Of cells.
        tokens: The map of a tower's tokens; None where they were given.
        prefix: (B, P, C) a tower's prefix tokens, likewise.
    """

    features: Features
    tokens: TokenMap | None = None
    prefix: Tensor | None = None


def features_of(
    selector: Selector,
    tower: nn.Module | None,
    images: Images | None,
    *,
    keep: Keep = None,
    block: int | None = None,
    merge: int | None = None,
    max_norm: float | None = None,
    tokens: Tensor | None = None,
    grid: Size | None = None,
    scores: Tensor | str = CLASS_ROW,
    keys: Tensor | None = None,
    relevance: Tensor | None = None,
    early: Tensor | None = None,
) -> TowerFeatures:
    """Features of a tower and images, or those given in their place; arguments as for ``select_tokens``.

    Args:
        early: (B, N) scores of the first block for ``tokens``.

    Raises:
        ValueError: Something that the selector needs and did not get, or got and does not use; another shape.
        TypeError: Both or neither of a tower and tokens, or parts of both.
    """
    if (tower is None) == (tokens is None) or (tower is None) != (images is None):
        raise TypeError("give a tower and its images (parts, frames), or tokens= and grid= without them")
    if tower is None:
        features = given_features(selector, tokens, grid, scores, keys, relevance, early)
        refuse_unused(selector, max_norm=max_norm)
        return TowerFeatures(_in_cells(features, 1 if merge is None else merge, max_norm))
    assert images is not None
    if isinstance(scores, Tensor) or any(value is not None for value in (keys, grid, early)):
        raise TypeError("scores, keys, early and grid of a tower are its own; give them beside tokens= only")
    module = SelectingTower(tower, selector, keep=keep, block=block, merge=merge, scores=scores, max_norm=max_norm)
    return module.read(images, relevance)


def uses(selector: Selector | type[Selector]) -> dict[str, bool]:
    """Which of the arguments beside the features a method reads."""
    return {
        "scores": selector.row is not None,
        "max_norm": selector.row is not None,
        "keys": selector.keys is not None,
        "relevance": selector.reads_relevance,
        "early": selector.reads_first,
        "image_size": selector.reads_padding,
    }


def refuse_unused(selector: Selector, **given: object) -> None:
    """Raise a ValueError for an argument that is not None, and that the selector would ignore."""
    for name, value in given.items():
        if value is not None and not uses(selector)[name]:
            users = ", ".join(known for known in SELECTORS if uses(SELECTORS[known])[name])
            raise ValueError(
                f"{selector.name} does not use {name}, which would change nothing; leave it out, or use one of {users}"
            )


def check_tensor(name: str, value: object) -> None:
    """Raise a TypeError for what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; torch.as_tensor makes one of an array")


def given_features(
    selector: Selector,
    tokens: Tensor | None,
    grid: Size | None,
    scores: Tensor | str,
    keys: Tensor | None,
    relevance: Tensor | None,
    early: Tensor | None,
) -> Features:
    """Features in place of a tower, if they are what the selector needs, of one grid."""
    if tokens is None or grid is None:
        raise TypeError("tokens need grid=(H, W), the patches they are of")
    check_sides("grid", grid)
    named = {"tokens": tokens, "keys": keys, "relevance": relevance, "early": early}
    for name, value in named.items():
        if value is not None:
            check_tensor(name, value)
    given = scores if isinstance(scores, Tensor) else None
    for name, value in (named | {"scores": given}).items():
        if value is not None and not value.is_floating_point():
            raise TypeError(f"{name} must be of a floating-point dtype, got {value.dtype}; convert them")
    if tokens.ndim != 3 or tokens.shape[1] != math.prod(grid) or not tokens.shape[2]:
        raise ValueError(f"tokens must be (B, {math.prod(grid)}, C) for a grid of {grid}, got {tuple(tokens.shape)}")
    if given is None and not (isinstance(scores, str) and scores == CLASS_ROW):
        raise TypeError(f"scores of tokens are a tensor (B, N), got {scores!r}; a name says what to read of a tower")
    if given is None and selector.row is not None:
        raise ValueError(
            f"{selector.name} chooses by the tower's attention, but only tokens were given; give scores= (B, N)"
            f"{' and keys= (B, N, D)' if selector.keys else ''}, or use a method that needs features alone: 'divprune'"
        )
    if selector.keys is not None and keys is None:
        raise ValueError(f"{selector.name} compares keys of the tower's attention; give keys= (B, N, D) too")
    if selector.reads_first and early is None:
        raise ValueError(f"{selector.name} needs scores of the first block too; give early= (B, N)")
    refuse_unused(selector, scores=given, keys=keys, relevance=relevance, early=early)
    for name, value in (("scores", given), ("relevance", relevance), ("early", early)):
        if value is not None and value.shape != tokens.shape[:2]:
            raise ValueError(f"{name} must be (B, N) = {tuple(tokens.shape[:2])}, got shape {tuple(value.shape)}")
    if keys is not None and (keys.ndim != 3 or keys.shape[:2] != tokens.shape[:2]):
        number, cells = tokens.shape[:2]
        raise ValueError(f"keys must be (B, N, D) = ({number}, {cells}, D), got shape {tuple(keys.shape)}")
    return Features(tokens, grid, given, keys, relevance, early)


class SelectingTower(nn.Module):
    """A tower and a selector as one module, up to what is chosen from; arguments as for ``select_tokens``.

    Its subclasses choose from images one by one (``TokenSelector``), from the crops of an image (``CropSelector``) or
    from the frames of a video (``VideoSelector``). It runs on the modules of the tower, which stays as it is. What
    measures and counts models takes it as one.

    Attributes:
        views: How many images (channels, H, W) it takes together as one: the crops of an image, the frames of a video.
        settings: What it was asked for beside the tower and the method, as keywords of ``select_tokens``; block and
            merge as the tower has them where nobody asked.
        own_settings: Those of them that are the method's.
    """

    views = 1

    def __init__(
        self,
        tower: nn.Module,
        method: str | Selector,
        *,
        keep: Keep = None,
        block: int | None = None,
        merge: int | None = None,
        scores: str = CLASS_ROW,
        max_norm: float | None = None,
        **settings: Setting,
    ) -> None:
        super().__init__()
        self.selector = make_selector(method, settings)
        self.own_settings: Settings = dict(settings)
        self.keep, self.max_norm = keep, max_norm
        check_choice("scores", scores, (CLASS_ROW, RECEIVED))
        refuse_unused(self.selector, scores=None if scores == CLASS_ROW else scores, max_norm=max_norm)
        host = tower_host(tower)
        leaving = leaving_block(host, block)
        block = leaving - len(host.blocks) if block is None else block
        self.tower = Tower(host, leaving, _reads(self.selector, host, leaving, scores))
        self.merge = _side_of_cells(self.tower, merge)
        asked: Settings = {"keep": keep, "block": block, "merge": self.merge, "scores": scores, "max_norm": max_norm}
        self.settings = asked | self.own_settings
        grid = host.patch_embed.grid_size
        if self.fixed_grid is not None:
            self.selector.count(keep, self.fixed_grid)
        if self.tower.fills_cells or not any(side % self.merge for side in grid):  # else only other sizes are met
            self.selector.settle(self.cells(grid))

    @property
    def adapts(self) -> bool:
        """Whether the number of tokens, and so the cost, depends on the image."""
        return self.keep is None and self.selector.adapts

    def keeps_all(self, size: Size) -> bool:
        """Whether all cells of images (H, W) leave as they are.

        Raises:
            ValueError: A number of tokens that the method cannot give of them.
        """
        cells = self.cells(grid_of(size, self.tower.host))
        return not self.selector.learns and self.count(size) == self.views * math.prod(cells)

    def count(self, size: Size) -> int | None:
        """How many tokens leave all views (H, W) together; None if that depends on what they show."""
        return self.selector.count_all(self.keep, self.cells(grid_of(size, self.tower.host)), self.views)

    def cells(self, grid: Size) -> Size:
        """(H, W) cells that are chosen from on a grid of patches."""
        return cell_grid(grid, self.merge, self.tower.fills_cells)

    @property
    def fixed_grid(self) -> Size | None:
        """(H, W) cells of every image; None of a tower that takes images of any size."""
        host = self.tower.host
        return None if getattr(host, "dynamic_img_size", False) else self.cells(host.patch_embed.grid_size)

    @property
    def token_dim(self) -> int:
        """Channels of the tokens that are chosen from."""
        return self.tower.channels * (self.merge**2 if self.tower.merge is None else 1)

    @property
    def patch_embed(self) -> PatchEmbedding:
        """That of the tower, which says what images it takes."""
        return self.tower.host.patch_embed

    @property
    def pretrained_cfg(self) -> dict[str, object]:
        """timm's configuration of the tower, which says how its images are prepared; empty if it has none."""
        return getattr(self.tower.host, "pretrained_cfg", {})

    def tower_terms(self, size: Size) -> tuple[Terms, SelectionSizes]:
        """MACs of all views (H, W) by term up to where their tokens leave, and what the selector meets in each.

        Raises:
            ValueError: Patches that are missing where all are needed.
        """
        terms, patches, left, once = self.tower.cost(size)
        more = self.views - 1
        terms = Terms({name: terms[name] + more * (terms[name] - once[name]) for name in terms})
        if left < math.prod(patches):
            self._check_whole(left, math.prod(patches))
        grid = self.cells(patches)
        left = left if self.merge == 1 else math.prod(grid)
        attn = self.tower.host.blocks[0].attn
        key_dim = {"mean": attn.head_dim, "joined": attn.num_heads * attn.head_dim}.get(self.selector.keys or "", 0)
        return terms, SelectionSizes(left, left, self.token_dim, key_dim, grid)

    def view_by_view(self, size: Size) -> Terms:
        """MACs of all views (H, W) by term, each chosen from alone; errors as of ``TokenSelector.closed_form``."""
        refuse_elsewhere(self.selector)
        selector = self.selector
        terms, sizes = self.tower_terms(size)
        kept = selector.count(self.keep, sizes.grid)
        if kept is None:
            raise ValueError(
                f"{selector.name} without keep leaves as many tokens as the image needs, so its cost does not follow "
                "from sizes; give keep, or count on images by effvit.count_flops(..., images=...)"
            )
        if kept < sizes.tokens or selector.learns:
            if type(selector).cost is Selector.cost:
                raise TypeError(
                    f"the selector {selector.name!r} has no closed form; give it a cost, or use effvit.count_flops "
                    "instead"
                )
            if selector.learns and self.views > 1:
                raise TypeError(
                    f"the queries of {selector.name} are made once for all {self.views} views, which its closed form "
                    "does not tell apart; use effvit.count_flops instead"
                )
            terms["selection"] += self.views * selector.cost(sizes._replace(kept=kept))
        return terms

    def read(self, images: Images, relevance: Tensor | None = None) -> TowerFeatures:
        """What the selector may choose by, the map of the tokens, and the prefix tokens (B, P, C)."""
        refuse_unused(self.selector, relevance=relevance)
        output: TowerOutput = self.tower(images)
        tokens = output.tokens
        self._check_map(tokens)
        if relevance is not None:
            expected = (len(output.patches), tokens.num_patches)
            check_tensor("relevance", relevance)
            if relevance.shape != expected:
                raise ValueError(f"relevance must be for {expected} patches, got {tuple(relevance.shape)}")
            relevance = relevance.gather(1, tokens.anchor) if tokens.moved else relevance
        notes = list(output.notes)
        early = notes.pop(0) if self.selector.reads_first else None
        row = notes.pop(0) if self.selector.row is not None else None
        keys = notes.pop(0) if self.selector.keys is not None else None
        features = Features(output.patches, tokens.grid, row, keys, relevance, early)
        in_cells = _in_cells(features, self.merge, self.max_norm, self.tower.projected(output), self.tower.fills_cells)
        return TowerFeatures(in_cells, tokens, output.prefix)

    def _check_whole(self, left: int, patches: int) -> None:
        """Raise a ValueError if the tower leaves fewer tokens than patches, all of which are needed in place."""
        if self.merge == 1 and not self.selector.whole_grid:
            return
        drop = self.tower.host.token_drop
        who = f"a merger of {self.merge} x {self.merge}" if self.merge > 1 else self.selector.name
        dropping = drop is not None and drop.training and drop.prob > 0
        cause, remedy = (
            ("patch_drop_rate is on and", "call eval()")
            if dropping
            else (self.tower.host.method, "use the dense tower")
        )
        raise ValueError(f"{who} needs all patches in place, but {cause} leaves {left} of {patches}; {remedy}")

    def _check_map(self, tokens: TokenMap) -> None:
        if not tokens.moved:
            return
        self._check_whole(tokens.num_tokens, tokens.num_patches)
        if self.tower.host.variable_length or tokens.soft:
            raise ValueError(
                f"{self.tower.host.method} leaves tokens that differ in number or stand for soft clusters, which no "
                "selector follows; use a method with a fixed number, such as 'evit' or 'tome', in the tower"
            )


class TokenSelector(SelectingTower):
    """A tower and a selector as one module, images (B, 3, H, W) -> Selection; arguments as for ``select_tokens``.

    It runs on the modules of the tower, which stays as it is, and can be compiled and exported if the number of tokens
    does not depend on the image. What measures, counts and draws models takes it as one.
    """

    def forward(self, images: Images, relevance: Tensor | None = None) -> Selection:
        """The tokens that leave the tower; ``images`` and ``relevance`` (B, N) as for ``select_tokens``."""
        features, tokens, prefix = self.read(images, relevance)
        return choose_tokens(self.selector, features, self.keep, tokens, prefix)

    def closed_form(self, size: Size) -> Terms:
        """MACs of one image (H, W) by term: of the tower up to where its tokens leave, and of "selection".

        Raises:
            ValueError: A number of tokens that depends on the image, or patches that are missing where all are needed.
            TypeError: A method without a closed form.
        """
        return self.view_by_view(size)

    def trace_stages(self, x: Tensor) -> list[Stage]:
        """What becomes of the patches of an image (1, 3, H, W) inside the tower, and which of them it hands over.

        Raises:
            TypeError: A method whose tokens are mixtures of all cells.
        """
        host, selection = self.tower.host, self(x)
        if selection.group is None:
            raise TypeError(
                f"the tokens of {self.selector.name} are mixtures of all cells, which belong to none of them; their "
                "attention to the cells, of QueryPooler.attend, shows what they hold"
            )
        trace = host.trace_tokens(x) if self.tower.reducing else []
        stages = [map_stage(trace[i].tokens, i) for i in self.tower.reducing if i <= self.tower.block]
        labels = selection.group[0].unflatten(0, selection.grid).cpu().numpy()
        return [*stages, Stage(self.tower.block, int(selection.counts[0]), labels, handed_over=True)]


def _side_of_cells(tower: Tower, merge: int | None) -> int:
    """Patches of a side of the cells that are chosen: what was asked for, or what the tower's own projector reads."""
    if tower.merge is None:
        return 1 if merge is None else check_count("merge", merge, 1)
    if merge not in (None, tower.merge):
        raise ValueError(
            f"the projector of this tower makes one token of {tower.merge} x {tower.merge} patches, got merge={merge}; "
            "leave merge out, or create the tower without its projector"
        )
    return tower.merge


def _reads(selector: Selector, host: ReducedHost, block: int, scores: str) -> list[tuple[int, Read]]:
    """Blocks of the tower, and what to read of their attention."""
    place = -1 if selector.reads_last else block
    keys = [] if selector.keys is None else [(place, KEYS[selector.keys])]
    if selector.row is None:
        return keys
    row = ROWS[selector.row]
    if scores == RECEIVED:
        if selector.row == "one_head":
            raise ValueError(
                f"{selector.name} weights patches by the class token's attention, for which the attention received is "
                "no substitute; use 'visionzip' with scores='received'"
            )
        row = ROWS[RECEIVED]
    elif selector.row != RECEIVED and host.num_class_tokens == 0:
        received = "" if selector.row == "one_head" else "give scores='received', the mean attention each gets, or "
        raise ValueError(
            f"{selector.name} scores patches by the class token, but the tower has none; {received}use a method that "
            "needs features alone, such as 'divprune'"
        )
    early = [(0, row)] if selector.reads_first else []
    return [*early, (place, row), *keys]


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=wide_dtype(x.dtype))


def _in_cells(
    features: Features, merge: int, max_norm: float | None, projected: Tensor | None = None, filled: bool = False
) -> Features:
    """The features of patches as those of cells, the rest widened; scores of patches without content last.

    Args:
        features: Of patches.
        merge: Side of a cell.
        max_norm: Norm of a patch from which on it holds no content.
        projected: (B, cells, C') what leaves in place of the patches of a cell side by side.
        filled: As for ``cell_grid``.
    """
    x, grid = features.x, features.grid
    outliers = None
    if max_norm is not None:
        outliers = _norms(x) > check_number("max_norm", max_norm, "positive")  # (B, N)
        outliers = cell_means(outliers.float(), grid, merge, filled) > 0
    means = [y if y is None else cell_means(widened(y), grid, merge, filled) for y in features[2:6]]
    scores, keys, relevance, early = means
    if scores is not None and outliers is not None:
        below = torch.nextafter(scores.amin(dim=1, keepdim=True), scores.new_tensor(-math.inf))
        scores = torch.where(outliers, below, scores)
    cells = cell_grid(grid, merge, filled)
    of_cells = to_cells(x, grid, merge) if projected is None else projected
    return Features(of_cells, cells, scores, keys, relevance, early, outliers)


def choose_tokens(
    selector: Selector,
    features: Features,
    keep: Keep,
    tokens: TokenMap | None = None,
    prefix: Tensor | None = None,
) -> Selection:
    """What the selector makes of features, in image order.

    Args:
        selector: The method.
        features: Of cells.
        keep: How many, as for ``select_tokens``.
        tokens: Where the tokens are if some of the cells are gone already.
        prefix: Prefix tokens, handed on.
    """
    refuse_elsewhere(selector)
    name, number = selector.name, features.num_tokens
    check_features(features, selector)
    kept = selector.count(keep, features.grid)
    if kept is None:
        refuse_recording(
            features.x, f"{name} without keep leaves as many tokens as an image needs", "give keep, a number of tokens"
        )
        choice = selector.adapt(features) if len(features.x) else _of_no_image(features)
        return arranged(_checked(choice, None, selector, features), features, tokens, prefix)
    if kept > number:
        raise ValueError(f"{name} is to keep {kept} tokens, but only {number} leave the tower; keep fewer")
    if kept == number and not selector.learns:
        ids = torch.arange(number, device=features.x.device).expand(features.x.shape[0], -1)
        return arranged(Choice(ids, features.x), features, tokens, prefix)
    selector.check(kept, features)
    return arranged(_checked(selector.choose(features, kept), kept, selector, features), features, tokens, prefix)


def _of_no_image(features: Features) -> Choice:
    """What an empty batch leaves."""
    group = torch.zeros(0, features.num_tokens, dtype=torch.int64, device=features.x.device)
    return Choice(group[:, :0], group=group, valid=group[:, :0].bool())


def _checked(choice: Choice, kept: int | None, selector: Selector, features: Features) -> Choice:
    """The choice, or an error unless it has the form of ``Choice``: ``kept`` tokens of each image, none twice.

    Of what is recorded the number of tokens alone is looked at: other shapes of a graph may be open.
    """
    name, (batch, number) = selector.name, features.x.shape[:2]
    if not isinstance(choice, Choice):
        raise TypeError(f"{name} must return an effvit.selectors.Choice, got {type(choice).__name__}")
    ids, many = choice.ids, "K" if kept is None else str(kept)
    recorded = is_recorded(features.x)
    if ids.ndim != 2 or kept not in (None, ids.shape[1]) or (not recorded and len(ids) != batch):
        raise ValueError(
            f"{name} must choose ids (B, {many}), got shape {tuple(ids.shape)} for {batch} images; choose as many as "
            "count says"
        )
    if recorded:
        return choice
    shape = tuple(ids.shape)
    for what, values, expected, dtype in (
        ("ids", ids, shape, torch.int64),
        ("group", choice.group, (batch, number), torch.int64),
        ("valid", choice.valid, shape, torch.bool),
    ):
        if values is not None and (values.shape != expected or values.dtype != dtype):
            raise ValueError(
                f"{name}: {what} must be {expected} of {dtype}, got {tuple(values.shape)} of {values.dtype}"
            )
    if choice.tokens is not None:
        if choice.tokens.ndim != 3 or choice.tokens.shape[:2] != shape:
            raise ValueError(f"{name}: tokens must be {(*shape, 'C')}, got shape {tuple(choice.tokens.shape)}")
        check_finite(choice.tokens.detach(), f"{name}: the tokens that leave", features.x)
    if choice.valid is not None and choice.group is None and not choice.mixed:
        raise ValueError(f"{name}: a choice with padding names its groups; give group (B, N) too")
    check_distinct(ids, choice.valid, number, f"{name}: the ids")
    if choice.group is not None:
        check_group(choice.group, ids, choice.valid, f"{name}: the group")
    return choice


def refuse_elsewhere(selector: Selector) -> None:
    """Raise a ValueError for a selector of the parts of an image or of a video."""
    if selector.takes != "select_tokens":
        raise ValueError(
            f"{selector.name} chooses among the parts of one image or the frames of one video; use "
            f"effvit.{selector.takes}, or 'class_attention' for images one by one"
        )


def check_features(features: Features, selector: Selector) -> None:
    """Raise a ValueError that names the first image of which anything is NaN, or infinite where that has no meaning.

    Scores that are ranked alone may be: minus infinity keeps a cell out.
    """
    name = selector.name
    x = check_finite(features.x.detach(), f"{name}: the features", features.x)
    check_bounded(x, f"{name}: the features")
    for what, values in (
        ("scores", features.scores),
        ("keys", features.keys),
        ("relevances", features.relevance),
        ("early scores", features.early),
    ):
        if values is not None:
            check_finite(values, f"{name}: the {what}", x)
    weighed = features.scores if selector.weighs_scores else None
    for what, values in (("keys", features.keys), ("scores", weighed), ("early scores", features.early)):
        if values is not None:
            check_bounded(values, f"{name}: the {what}")


def arranged(choice: Choice, features: Features, tokens: TokenMap | None, prefix: Tensor | None) -> Selection:
    """The choice in image order, its ids and groups those of cells."""
    ids = choice.ids
    batch, width = ids.shape
    left = rows_of(features.x, ids) if choice.tokens is None else choice.tokens
    moved = tokens is not None and tokens.moved
    cells = tokens.anchor.gather(1, ids) if tokens is not None and moved else ids
    slots = torch.arange(width, device=ids.device).expand(batch, -1)
    valid = choice.valid
    beyond = math.prod(features.grid)
    place = cells if valid is None else torch.where(valid, cells, slots + beyond)
    order = place.argsort(dim=1)  # padding stays behind
    left, cells = rows_of(left, order), cells.gather(1, order)
    group = None if choice.mixed else _groups(choice, features, order)
    if group is not None and moved:
        assert tokens is not None
        group = torch.where(tokens.source < 0, -1, group.gather(1, tokens.source.clamp(min=0)))
    counts = ids.new_full((batch,), width) if valid is None else valid.sum(1)
    if valid is not None:
        valid = slots < counts.unsqueeze(1)
        left, cells = left.masked_fill(~valid.unsqueeze(-1), 0), cells * valid
    scores = None if moved else features.scores
    return Selection(left, cells, counts, valid, group, features.grid, scores, prefix)


def _groups(choice: Choice, features: Features, order: Tensor) -> Tensor:
    """(B, N) place in image order of the token that each token of the features went into, -1 for none."""
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    if choice.group is not None:
        return torch.where(choice.group < 0, -1, rank.gather(1, choice.group.clamp(min=0)))
    return torch.full_like(rank[:, :1], -1).expand(-1, features.num_tokens).scatter(1, choice.ids, rank)


def count_tokens(
    method: str | Selector,
    grid: Size,
    *,
    keep: Keep = None,
    merge: int = 1,
    frames: int = 1,
    **settings: Setting,
) -> int | None:
    """How many tokens ``select_tokens`` leaves, known before the tower runs; None if that depends on the image.

    Likewise for ``select_parts`` with HiRED's ``exact=True``, where ``frames`` are the parts of one image.

    Args:
        method: As for ``select_tokens``, and so are ``keep``, ``merge`` and ``settings``.
        grid: (H, W) patches of one image; of a projector that fills up its last cells (DeepSeek), the cells it makes.
        keep: How many.
        merge: Side of the cells.
        frames: Images of the same grid, whose tokens are counted together.
        settings: Settings of the method.

    Raises:
        ValueError: What ``select_tokens`` refuses of a number and a grid.
    """
    cells = cell_grid(check_sides("grid", grid), merge)
    return make_selector(method, settings).count_all(keep, cells, check_count("frames", frames, 1))
