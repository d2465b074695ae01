"""The search for DiffRate's numbers of tokens on a frozen host (arXiv 2305.17997, section 3.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from effvit.hosts.host import ReducedHost, check_host, place_reducers, sparsify
from effvit.reducers.diffrate import DiffRate
from effvit.reducers.diffrate_search import RateSearch, take_numbers
from effvit.schedule import check_count, check_fraction, check_number

__all__ = ["Found", "SearchedHost", "search_rates"]

TOLERANCE = 0.03  # of the share of multiply-adds that was asked for


class Found(NamedTuple):
    """What a pass of the search makes of images.

    Attributes:
        scores: (B, classes).
        macs: () multiply-adds of an image under the numbers of now, with their gradient.
    """

    scores: Tensor
    macs: Tensor


class SearchedHost:
    """A host whose blocks, but the first, prune and merge by numbers that have a gradient.

    It is in eval mode, where the official search has the host's drop path.

    Args:
        dense: A plain ViT with a class token; its weights are shared and get no gradient from ``search_rates``.
        step: Between the candidates of a number, in patches; officially 1.

    Raises:
        TypeError, ValueError: As ``effvit.sparsify``; a host without classes or of one block; a step that is no whole
            number from 1 on, or leaves a single candidate.
    """

    def __init__(self, dense: nn.Module, step: int = 1) -> None:
        if getattr(dense, "num_classes", 0) < 1:
            raise ValueError(
                "the search needs class scores to judge by, but the host has num_classes=0; give a classifier"
            )
        host = sparsify(dense, "diffrate", recover=None, share=True, **DiffRate.off())
        if not isinstance(host, ReducedHost):
            raise TypeError(f"diffrate's numbers are searched on plain ViTs, not on {type(dense).__name__}")
        if len(host.blocks) < 2:
            raise ValueError("diffrate keeps all tokens in the first block, so a host must have at least two blocks")
        patches = host.patch_embed.num_patches
        if check_count("step", step, 1) >= patches:
            raise ValueError(
                f"step must leave several candidates of {patches} patches, got {step}; give one below that"
            )
        place_reducers(host, {block: RateSearch(step) for block in range(1, len(host.blocks))})
        check_host(host)
        self.host = host.eval()
        self.searches = [reducer for reducer in host.reducers.values() if isinstance(reducer, RateSearch)]

    @property
    def logits(self) -> list[nn.Parameter]:
        """Those of all numbers: of each block from the second on what pruning leaves, then what merging leaves."""
        return [number.logits for search in self.searches for number in (search.prune, search.merge)]

    def __call__(self, images: Tensor) -> Found:
        """Scores of images (B, 3, H, W) of the host's size, and what they cost.

        Raises:
            ValueError: Images of another size, which a host with ``dynamic_img_size`` would take.
        """
        size, native = tuple(images.shape[-2:]), to_2tuple(self.host.patch_embed.img_size)
        if size != native:
            raise ValueError(
                f"numbers are searched for images of {native[0]} x {native[1]}, got {size[0]} x {size[1]}; resize "
                "them, or the host by set_input_size"
            )
        take_numbers(self.searches)
        return Found(self.host(images), self.macs())

    def macs(self, dense: bool = False) -> Tensor:
        """() multiply-adds of embedding, projections, attention, MLPs and head (patch/deit.py@91ae3e3).

        The number of tokens behind a block is the least of those before it and of what pruning and merging leave; its
        gradient goes to both of these in full, and none to the first. A stem of several layers counts as if all of them
        worked on the patch grid. ``dense``: of the host with all its tokens.
        """
        host, prefix, patches = self.host, self.host.num_prefix_tokens, self.host.patch_embed.num_patches
        tokens = torch.tensor(float(prefix + patches), device=self.logits[0].device)
        heads = sum(linear_weights(head) for head in (host.head, getattr(host, "head_dist", None)) if head is not None)
        total = tokens.new_tensor(float(patches * linear_weights(host.patch_embed) + heads))
        found = {} if dense else {search.block: search for search in self.searches}
        for number, block in enumerate(host.blocks):
            total = total + linear_weights(block.attn) * tokens + 2 * tokens**2 * host.embed_dim
            if number in found:
                left = [prefix + own() for own in (found[number].prune, found[number].merge)]
                least = torch.stack([tokens, *left]).min().detach()
                tokens = least + sum(value - value.detach() for value in left)
            total = total + linear_weights(block.mlp) * tokens
        return total

    def settings(self) -> dict[str, list[int]]:
        """The numbers of now as settings of the method."""
        take_numbers(self.searches)
        patches = self.host.patch_embed.num_patches
        return {
            "prune_to": [patches, *(search.pruned for search in self.searches)],
            "merge_to": [patches, *(search.merged for search in self.searches)],
        }


def linear_weights(module: object) -> int:
    """Entries of a module's matrices: the multiply-adds of its projections for one token."""
    assert isinstance(module, nn.Module)
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d)))


def search_rates(
    dense: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    macs: float,
    *,
    steps: int,
    step: int = 1,
    lr: float = 0.01,
    weight: float = 100.0,
    on_step: Callable[[float, float], None] | None = None,
) -> dict[str, list[int]]:
    """Find how many tokens each block of a frozen host should prune and merge, by gradients (DiffRate, 2305.17997).

    Only the logits of the numbers are trained, by AdamW without decay, whose rate falls to a tenth of ``lr`` by a
    cosine: main.py@91ae3e3, where three epochs of ImageNet take 3,750 steps of 1,024 images. The loss is the
    cross-entropy plus ``weight`` times the squared distance of the multiply-adds from their aim, both as shares of the
    dense model's. The official weight of 5 for squared GFLOPs is 106 for a DeiT-S.

    Args:
        dense: A plain ViT with a class token and trained weights, which stay as they are.
        batches: Images (B, 3, H, W) prepared for the model, and their classes (B,); read until the steps are done.
        macs: Aim, as a share of the dense model's multiply-adds, in (0, 1].
        steps: How many batches; the schedule of the rate depends on it.
        step: Between the candidates of a number, in patches; officially 1.
        lr: Learning rate at the beginning.
        weight: Of the multiply-adds in the loss.
        on_step: Called behind each step with the loss and the share of multiply-adds.

    Returns:
        A warning says so if their multiply-adds miss the aim by more than 0.03. Settings ``prune_to`` and ``merge_to``
        for ``effvit.sparsify(dense, "diffrate", ...)``.

    Raises:
        TypeError, ValueError: As ``SearchedHost``; a value out of range; fewer batches than steps; a loss that is not
            finite.
    """
    aim = check_fraction("macs", macs)
    number = check_count("steps", steps, 1)
    rate, factor = check_number("lr", lr), check_number("weight", weight)
    if rate <= 0 or factor < 0:
        raise ValueError(f"lr must be above 0 and weight at least 0, got {lr} and {weight}")
    searched = SearchedHost(dense, step)
    whole = searched.macs(dense=True).item()
    optimizer = torch.optim.AdamW(searched.logits, lr=rate, weight_decay=0.0)
    done = 0
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"batches must give pairs (images, labels), got {type(batch).__name__}")
        images, labels = batch
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done / number)) / 2)
        found = searched(images)
        share = found.macs / whole
        loss = F.cross_entropy(found.scores.float(), labels) + factor * (share - aim).square()
        if not loss.isfinite():
            raise ValueError(f"the loss of step {done} is {loss.item()}; lower lr, or use float32")
        for logits, gradient in zip(searched.logits, torch.autograd.grad(loss, searched.logits), strict=True):
            logits.grad = gradient
        optimizer.step()
        if on_step is not None:
            on_step(loss.item(), share.item())
        done += 1
        if done == number:
            reached = searched.macs().item() / whole
            if abs(reached - aim) > TOLERANCE:
                warnings.warn(
                    f"the numbers found take {reached:.2f} of the dense model's multiply-adds, not {aim:.2f}; search "
                    "with more steps, a larger lr or a larger weight",
                    stacklevel=2,
                )
            return searched.settings()
    raise ValueError(f"{number} steps take as many batches, got {done}; give an iterable that goes on, or fewer steps")
