"""DynamicViT: keep the patches that learnt predictors score highest (arXiv 2106.02034)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.block import with_gradients
from effvit.protocols import Host, Settings
from effvit.recording import is_recorded
from effvit.reducers.base import Reducer, check_finite
from effvit.reducers.block_schedule import BlockSchedule
from effvit.reducers.cost import BlockSizes, Change
from effvit.reducers.keep_rate import Rated
from effvit.schedule import check_blocks, check_fraction, check_number, check_switch, per_block, spread_blocks
from effvit.tokens import TokenMap, wide_dtype, widened

__all__ = [
    "DynamicViT",
    "KeepPredictor",
    "gumbel_noise",
    "hard_choice",
    "kept_token_loss",
    "ratio_loss",
]


class KeepPredictor(nn.Module):
    """Logits of keeping and of dropping each patch (2106.02034, eq. 1 to 5), under the official parameter names.

    Half of the features of a patch describe it alone, the other half are averaged over the patches that are left. The
    average is one vector an image, so its part of the next layer is computed once an image.

    Args:
        dim: C, channels of a token, in multiples of 4.
        mean_eps: What is added to the average.
        generator: Draws the weights, on the CPU; None: the default one.
        factory: ``device`` and ``dtype``.
    """

    def __init__(
        self, dim: int, mean_eps: float = 0.0, generator: torch.Generator | None = None, **factory: Any
    ) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(
                f"dynamicvit halves the channels of a token twice, so they must be a multiple of 4, got {dim}"
            )
        self.mean_eps = mean_eps
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, **factory), nn.Linear(dim, dim, **factory), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2, **factory),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4, **factory),
            nn.GELU(),
            nn.Linear(dim // 4, 2, **factory),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                values = torch.empty(module.weight.shape, device="cpu")
                module.weight.data.copy_(nn.init.trunc_normal_(values, std=0.02, generator=generator))
                nn.init.zeros_(module.bias)

    def forward(self, patches: Tensor, decision: Tensor | None = None) -> Tensor:
        """Logits (B, N, 2), of keeping first.

        Args:
            patches: (B, N, C).
            decision: (B, N) 1 for the patches that are left, 0 for those that were dropped; None: all are left.
        """
        local, pooled = self.in_conv(patches).chunk(2, dim=-1)  # (B, N, C/2) each
        if decision is None:
            mean = widened(pooled).mean(dim=1, keepdim=True)  # (B, 1, C/2)
        else:
            left = decision.unsqueeze(-1)
            mean = (widened(pooled) * left).sum(1, keepdim=True) / left.sum(1, keepdim=True).clamp(min=1)
        mean = (mean + self.mean_eps).to(pooled.dtype)
        first, half = self.out_conv[0], patches.shape[-1] // 2
        assert isinstance(first, nn.Linear)
        shared = F.linear(mean, first.weight[:, half:], first.bias)  # (B, 1, C/2)
        logits = F.linear(local, first.weight[:, :half]) + shared
        for layer in islice(self.out_conv, 1, None):
            logits = layer(logits)
        return logits


def gumbel_noise(like: Tensor) -> Tensor:
    """Gumbel noise in the shape of a tensor, drawn as torch's ``gumbel_softmax`` draws it."""
    return -torch.empty_like(like).exponential_().log()


def hard_choice(log_prob: Tensor, noise: Tensor) -> Tensor:
    """One-hot sample (..., 2) of log-probabilities and Gumbel noise, with the gradient of their softmax."""
    soft = (log_prob + noise).softmax(dim=-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


def ratio_loss(decisions: Sequence[Tensor], rates: Sequence[float]) -> Tensor:
    """Mean squared distance of the share that an image keeps, in each pruning block, from its rate (eq. 11).

    Args:
        decisions: (B, N) of each block.
        rates: Share of all patches to keep there.
    """
    shares = zip(decisions, rates, strict=True)
    return torch.stack([(decision.mean(1) - rate).square().mean() for decision, rate in shares]).mean()


def kept_token_loss(student: Tensor, teacher: Tensor, kept: Tensor, kind: str = "mse") -> Tensor:
    """Distance of the patch tokens that are left from those of a dense teacher (eq. 9); 0 where none is left.

    Args:
        student: (B, N, C) normalised patch tokens.
        teacher: (B, N, C); no gradient goes there.
        kept: (B, N) last decision; no gradient goes there either.
        kind: "mse", as for DeiT, or "kl", as for LV-ViT: the divergence of the softmax over channels.
    """
    mask = (kept.detach() > 0.5).to(student.dtype)  # (B, N)
    target = teacher.detach()
    if kind == "mse":
        distance = (student - target).square().mean(-1)  # (B, N)
    else:
        own, target = student.log_softmax(-1), target.log_softmax(-1)
        distance = F.kl_div(own, target, reduction="none", log_target=True).sum(-1)
    return (distance * mask).sum() / mask.sum().clamp(min=1)


class DynamicViT(Rated):
    """Keep the patches that a predictor of the block scores highest (DynamicViT, 2106.02034).

    Evaluation: before the j-th pruning block, counted from 1, the ``int(N * keep_rate**j)`` best of the N patches of
    the image stay, in descending order of their scores. Training: no patch leaves. Each is kept or dropped for good by
    a sample of its probability, and attention multiplies that decision in, so that its gradient reaches the predictors
    (``TokenMap.policy``; ``TokenMap.carry`` holds the decisions of all pruning blocks). A block of rate 1 draws no
    sample: its decision is that of the block before. The mode is that of the reducer itself: those in eval mode inside
    a model that trains drop patches for good and learn nothing, but none may do so behind one that trains, whose
    decisions are of patches that have not left.

    Follows models/dyvit.py of raoyongming/DynamicViT@1322e62 and of JoakimHaurum/TokenReduction@88fe07e, which differ
    in ``mean_eps`` alone. Deviations:

    - Scores are differences of the logits, which do not saturate as the official log-probabilities do.
    - Grids may be any, and prefix tokens of any number are never scored.
    - Attention before the first decision is the plain softmax, without the 1e-6 of the one with a policy, and attention
      dropout, which the official code ignores, is applied.
    - The average of an image that keeps no patch is 0, officially NaN.
    - Where the head pools patches, dropped ones have no weight in training.

    Biases of a new predictor are 0, by which one that has learnt nothing is known wherever its weights came from. A
    reducer that evaluates such a one says so, once.

    Attributes:
        earlier: The reducers of the blocks before.
        checked: The predictor was looked at for that.
    """

    name = "dynamicvit"
    summary = "keep the patches that learnt predictors score highest (2106.02034)"
    learns = True

    def __init__(
        self, keep_rate: float, block: int, earlier: tuple[DynamicViT, ...], progressive: bool, mean_eps: float
    ) -> None:
        super().__init__()
        self.keep_rate = self.base_keep_rate = keep_rate
        self.block = block
        self.earlier = earlier
        self.progressive = progressive
        self.mean_eps = mean_eps
        self.checked = False

    @classmethod
    def plan(
        cls,
        depth: int,
        *,
        keep_rate: float | Sequence[float] = 0.7,
        reduce_at: Sequence[int] | None = None,
        progressive: bool = True,
        mean_eps: float = 0.0,
    ) -> dict[int, Reducer]:
        """Settings of the method.

        Args:
            depth: Blocks of the host.
            keep_rate: Rate of each pruning block, in (0, 1]; one value, or with progressive=False one for each block.
            reduce_at: 0-based blocks before which patches are dropped; None means (3, 6, 9) of 12, in proportion for
                another depth.
            progressive: The j-th pruning block keeps ``keep_rate**j`` of all patches, as both codes do with one rate;
                False: keep_rate of all patches, as TokenReduction does with a list, which has no powers.
            mean_eps: What predictors add to the average of the patches: 0 in the authors' code, 1e-6 in
                TokenReduction's.
        """
        check_switch("progressive", progressive)
        if check_number("mean_eps", mean_eps) < 0:
            raise ValueError(f"mean_eps must be at least 0, got {mean_eps}")
        blocks = check_blocks("reduce_at", spread_blocks((3, 6, 9), depth) if reduce_at is None else reduce_at, depth)
        rates = {b: check_fraction("keep_rate", r) for b, r in per_block("keep_rate", keep_rate, blocks).items()}
        if progressive:
            check_one_rate(rates.values())
        plan: dict[int, DynamicViT] = {}
        for block, rate in rates.items():
            if rate < 1:
                plan[block] = cls(rate, block, tuple(plan.values()), progressive, mean_eps)
        return dict(plan)

    @classmethod
    def example(cls) -> Settings:
        return {"keep_rate": 0.7, "reduce_at": (1, 2)}

    @classmethod
    def demo(cls, num_patches: int) -> list[Settings]:
        return []

    @classmethod
    def ladders(cls, depth: int, num_patches: int) -> list[list[Settings]]:
        return []

    @classmethod
    def block_schedule(cls, settings: Settings, depth: int) -> BlockSchedule | None:
        return None

    def settle(self, host: Host, block: int) -> None:
        super().settle(host, block)
        like = next(host.parameters())
        generator = torch.Generator("cpu").manual_seed(block)  # the same for a block whenever a model is made
        self.predictor = KeepPredictor(host.embed_dim, self.mean_eps, generator, device=like.device, dtype=like.dtype)
        self.train(host.blocks[block].training)

    @property
    def reduce_at(self) -> list[int]:
        """The pruning blocks that this one's share of the patches depends on.

        ``model.settings`` compares it, so that it tells of an earlier reducer that was taken out by hand.
        """
        return [reducer.block for reducer in (*self.earlier, self)] if self.progressive else [self.block]

    @property
    def stage(self) -> int:
        """j, the power of the rate."""
        return len(self.earlier) + 1

    @property
    def rate(self) -> float:
        """Share of all patches that are left behind this block.

        Raises:
            ValueError: The rates of the blocks differ, of which powers are to be taken.
        """
        if not self.progressive:
            return self.keep_rate
        check_one_rate([reducer.keep_rate for reducer in (*self.earlier, self)])
        return self.keep_rate**self.stage

    def count(self, num_tokens: int, num_patches: int) -> int:
        # torch.export would fix the number that int gives
        return min(num_tokens, max(math.floor(num_patches * self.rate), int(self.any_size)))

    def cost(self, at: BlockSizes) -> Change:
        power = self.stage if self.progressive else 1
        kept, dim = max(int(at.grid[0] * at.grid[1] * self.keep_rate**power), int(self.any_size)), at.dim
        if kept >= at.tokens:
            return Change(at.tokens, at.tokens, at.tokens, 0)
        of_patch = 5 * dim + dim**2 + dim**2 // 4 + dim**2 // 8 + dim // 2  # norm, and layers of which one is halved
        return Change(kept, kept, kept, at.tokens * of_patch + dim**2 // 4)

    def before(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        if self.training:
            return self.keep_all(x, tokens) if self.keep_rate == 1 else (x, self.decide(x, tokens))
        kept = self.count(tokens.num_tokens, tokens.num_patches)
        if kept >= tokens.num_tokens:
            return x, tokens
        if tokens.carry is not None:
            raise ValueError(
                f"dynamicvit in block {self.block} is in eval mode and would drop patches for good, but an earlier "
                "pruning block trains and has decided over all of them; put both into one mode by train() or eval()"
            )
        if not is_recorded(x) and not self.checked:
            self.checked = True
            if not self.has_learnt:
                warn_of_random_weights()
        logits = widened(self.predictor(tokens.split(x)[1]))  # (B, N, 2)
        scores = check_finite(logits[..., 0] - logits[..., 1], self.origin("scores of the predictor"), x)  # (B, N)
        return tokens.select(x, scores.topk(kept, dim=1).indices, kept)

    def decide(self, x: Tensor, tokens: TokenMap) -> TokenMap:
        """The map whose policy drops patches by a sample, for training."""
        prefix, patches = tokens.split(x)
        former: tuple[Tensor, ...] = () if tokens.carry is None else tuple(tokens.carry)
        log_prob = widened(self.predictor(patches, former[-1] if former else None)).log_softmax(-1)  # (B, N, 2)
        check_finite(log_prob, self.origin("scores of the predictor"), x)
        decision = hard_choice(log_prob, gumbel_noise(log_prob))[..., 0]  # (B, N)
        if former:
            decision = decision * former[-1]
        policy = torch.cat([torch.ones_like(prefix[..., 0], dtype=decision.dtype), decision], dim=1)  # (B, P+N)
        return replace(tokens, policy=policy, carry=(*former, decision))

    def keep_all(self, x: Tensor, tokens: TokenMap) -> tuple[Tensor, TokenMap]:
        """Training at rate 1: the tokens as they are, and the decision of the block before once more."""
        former: tuple[Tensor, ...] = () if tokens.carry is None else tuple(tokens.carry)
        patches = tokens.split(x)[1]
        decision = former[-1] if former else torch.ones_like(patches[..., 0], dtype=wide_dtype(x.dtype))  # (B, N)
        return with_gradients(x, self.predictor), replace(tokens, carry=(*former, decision))

    @property
    def has_learnt(self) -> bool:
        biases = [value.detach() for name, value in self.predictor.named_parameters() if name.endswith("bias")]
        return not is_recorded(biases[0]) and bool(torch.cat(biases).any())  # one read of the device


def check_one_rate(rates: Iterable[float]) -> None:
    """Raise a ValueError unless the rates are equal, of which each pruning block takes a power."""
    given = [*rates]
    if any(rate != given[0] for rate in given):
        raise ValueError(
            f"keep_rate must be one rate with progressive=True, of which each block takes a power, got {given}; give "
            "one, or progressive=False, with which each rate is a share of all patches"
        )


def warn_of_random_weights() -> None:
    """Say that predictors are new; ``warnings`` tells it once."""
    warnings.warn(
        "dynamicvit chooses patches by predictors with random weights; load weights that were trained with them, or "
        "train the model",
        stacklevel=3,
    )
