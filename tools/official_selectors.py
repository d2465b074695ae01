"""Official selections behind vision towers beside ours: what each reads is handed to it, the tower itself is not run.

The official functions are methods of language models and towers. They are called unbound, on a stand-in that has what
they read: hidden states, attention maps, the queries and keys of a block. Whatever they compute of these counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from official_code import SHARES, Official, Pair, Setting, found_equal, load_file
from torch import Tensor, nn

from effvit.attention import AttnState
from effvit.hosts.tower_exit import KEYS, ROWS
from effvit.selectors import Features, Selection, Selector
from effvit.selectors.cdpruner import relevance_to_text
from effvit.selectors.holitom import HoliTom
from effvit.selectors.registry import make_selector
from effvit.selectors.select import choose_tokens
from effvit.tokens import TokenMap

__all__ = ["SELECTIONS"]

WIDTH, HEADS = 1024, 16
LLAVA_ARCH = "llava/model/llava_arch.py"
CLIP = "llava/model/multimodal_encoder/clip_encoder.py"
FRAMES = 4  # of a video, in which the tokens of one image are those of all frames


class Inputs(NamedTuple):
    """What leaves a tower, drawn at random.

    Attributes:
        hidden: (B, 1+N, C) with the class token.
        state: The attention of a block.
        setting: What is asked for.
    """

    hidden: Tensor
    state: AttnState
    setting: Setting

    @property
    def x(self) -> Tensor:
        """(B, N, C) patch tokens."""
        return self.hidden[:, 1:]

    @property
    def joined(self) -> tuple[Tensor, Tensor]:
        """(B, 1+N, C) queries and keys, the heads side by side, as projections give them."""
        q, k = (part.transpose(1, 2).flatten(2) for part in (self.state.q, self.state.k))
        return q, k

    @property
    def kept(self) -> int:
        """K."""
        assert self.setting.divisor is not None
        return math.prod(self.setting.grid) // self.setting.divisor


def draw(setting: Setting) -> Inputs:
    """Standard normal numbers, always the same."""
    generator = torch.Generator().manual_seed(0)
    length = 1 + math.prod(setting.grid)
    hidden = torch.randn(setting.batch_size, length, WIDTH, generator=generator)
    heads = (setting.batch_size, HEADS, length, WIDTH // HEADS)
    q, k, v = (torch.randn(heads, generator=generator) for _ in range(3))
    tokens = TokenMap.full(hidden, setting.grid, num_prefix=1, num_class=1)
    return Inputs(hidden, AttnState.of(q, k, v, heads[-1] ** -0.5, tokens), setting)


def chosen(selector: Selector, inputs: Inputs, kept: int | None, relevance: Callable[[], Tensor] | None) -> Selection:
    """Our selection, with what it reads of the attention."""
    scores = None if selector.row is None else ROWS[selector.row](inputs.state)
    keys = None if selector.keys is None else KEYS[selector.keys](inputs.state)
    text = None if relevance is None else relevance()
    return choose_tokens(selector, Features(inputs.x, inputs.setting.grid, scores, keys, text), kept)


def pair(
    method: str,
    inputs: Inputs,
    official: Callable[[], Tensor],
    kept: int | None,
    ids: bool = False,
    relevance: Callable[[], Tensor] | None = None,
    **settings: Any,
) -> Pair:
    """The official run beside ours, compared by places (B, K) if ``ids``, else by tokens (B, K, C)."""
    selector = make_selector(method, settings)
    if kept is not None:
        selector.count(kept, inputs.setting.grid)
        selector.settle(inputs.setting.grid)
    ours = partial(chosen, selector, inputs, kept, relevance)
    with torch.inference_mode():
        result, own = official(), ours()
    equal = found_equal(result, own.ids if ids else own.tokens, "ids" if ids else "tokens")
    return Pair(lambda _: official(), lambda _: ours(), inputs.hidden, equal)


class Tower(nn.Module):
    """Stands in for CLIP: its result is at hand, and its projections give what they were given."""

    def __init__(self, output: SimpleNamespace, q: Tensor, k: Tensor) -> None:
        super().__init__()
        self.output = output
        attention = SimpleNamespace(q_proj=_Given(q), k_proj=_Given(k))
        layer = SimpleNamespace(self_attn=attention, metric=None)
        self.vision_model = SimpleNamespace(encoder=SimpleNamespace(layers=[layer] * 24))
        self.attention = attention

    def forward(self, *_: object, **__: object) -> SimpleNamespace:
        self.attention.q_proj(None)
        self.attention.k_proj(None)
        return self.output


class _Given(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: object) -> Tensor:
        return self.value


def clip_tower(module: Any, inputs: Inputs) -> SimpleNamespace:
    """What the methods of a CLIPVisionTower read of it."""
    output = SimpleNamespace(hidden_states=[inputs.hidden] * 25)
    own = SimpleNamespace(vision_tower=Tower(output, *inputs.joined), select_layer=-2, select_feature="patch")
    own.device, own.dtype = inputs.hidden.device, inputs.hidden.dtype
    own.feature_select = partial(module.CLIPVisionTower.feature_select, own)
    return own


def visionzip(code: Path, setting: Setting) -> Pair:
    """Without ``transformers``; the attention map is at hand, ours computes the row of it that it reads."""
    kind = load_file(code / "VisionZip/visionzip/clip_encoder.py").CLIPVisionTower_VisionZip
    inputs = draw(setting)
    contextual = inputs.kept * 10 // 64
    q, k = inputs.state.q, inputs.state.k
    attention = (q @ k.transpose(2, 3) * inputs.state.scale).softmax(-1)
    tower = Tower(SimpleNamespace(hidden_states=[inputs.hidden] * 25, attentions=[attention] * 24), *inputs.joined)
    tower._info = {"dominant": inputs.kept - contextual, "contextual": contextual}  # type: ignore[assignment]
    tower.vision_model.encoder.layers[-2].metric = k.mean(1)
    own = SimpleNamespace(vision_tower=tower, device=inputs.hidden.device, dtype=inputs.hidden.dtype)
    return pair("visionzip", inputs, lambda: kind.forward(own, inputs.hidden)[0][:, 1:], inputs.kept)


def prumerge(code: Path, setting: Setting, plus: bool = False) -> Pair:
    """``keep`` counts the token of all others too."""
    module = load_file(code / "LLaVA-PruMerge" / CLIP)
    inputs = draw(setting)
    own, kind = clip_tower(module, inputs), module.CLIPVisionTower
    merge = kind.token_prune_merge_advanced_plus if plus else kind.token_prune_merge_advanced
    method = "prumerge_plus" if plus else "prumerge"
    if plus and math.prod(setting.grid) != 576:
        raise ValueError("the official code spreads its even tokens over 576 places, whatever the number of tokens")
    if setting.divisor is None:
        return pair(method, inputs, lambda: merge(own, inputs.hidden), None)
    share = 1 / setting.divisor / (2 if plus else 1)
    return pair(method, inputs, lambda: merge(own, inputs.hidden, False, share), inputs.kept + 1)


def divprune(code: Path, setting: Setting) -> Pair:
    """On the tokens themselves, one image."""
    kind = load_file(code / "divprune/LLaVA" / LLAVA_ARCH).LlavaMetaForCausalLM
    inputs = draw(setting)
    own = SimpleNamespace(pairwise_cosine_similarity=partial(kind.pairwise_cosine_similarity, None))
    number, share = math.prod(setting.grid), inputs.kept / math.prod(setting.grid)

    def run() -> Tensor:
        ids: Tensor = kind.DivPrune(own, inputs.x[0], number, None, share)[0]
        return ids.unsqueeze(0)

    return pair("divprune", inputs, run, inputs.kept, ids=True)


def cdpruner(code: Path, setting: Setting) -> Pair:
    """With the relevance to one text, from embeddings of 768 channels."""
    kind = load_file(code / "CDPruner" / LLAVA_ARCH).LlavaMetaForCausalLM
    inputs = draw(setting)
    generator = torch.Generator().manual_seed(1)
    patches, texts = (torch.randn(*n, 768, generator=generator) for n in (inputs.x.shape[:2], (1,)))
    model = SimpleNamespace(get_vision_tower=lambda: lambda *_, **__: (inputs.x, patches, texts), mm_projector=_same)
    own = SimpleNamespace(get_model=lambda: model, visual_token_num=inputs.kept)

    def run() -> Tensor:
        mask: Tensor = kind.encode_images(own, inputs.hidden)[1]
        return mask.nonzero()[:, 1].view(len(mask), -1)

    relevance = partial(relevance_to_text, patches, texts)
    return pair("cdpruner", inputs, run, inputs.kept, ids=True, relevance=relevance)


def _same(x: Tensor) -> Tensor:
    return x


def aim(code: Path, setting: Setting) -> Pair:
    """In rounds that halve the tokens, the last of them as far as is asked."""
    merge = load_file(code / "AIM/llava/model/token_merge.py").bipartite_soft_matching_merge
    inputs = draw(setting)

    def run() -> Tensor:
        x = inputs.x
        while x.shape[1] > inputs.kept:
            x = merge(metric=x, r=x.shape[1] - inputs.kept, x=x)
        return x

    return pair("aim", inputs, run, inputs.kept)


def recoverable(code: Path, setting: Setting) -> Pair:
    """With similarities to a text; the official code overwrites them, so it gets a copy each time."""
    module = load_file(code / "Recoverable-Compression" / CLIP)
    inputs = draw(setting)
    own = clip_tower(module, inputs)
    text = 0.01 * torch.randn(inputs.x.shape[:2], generator=torch.Generator().manual_seed(1))
    merge = module.CLIPVisionTower.token_recycling_with_text_in_vision_and_clustring

    def run() -> Tensor:
        result: Tensor = merge(own, inputs.hidden, (text.clone().unsqueeze(1), ""))
        return result

    return pair("recoverable", inputs, run, None, relevance=lambda: text)


def matryoshka(code: Path, setting: Setting) -> Pair:
    """Average pooling alone."""
    kind = load_file(code / "matryoshka-mm" / LLAVA_ARCH).LlavaMetaForCausalLM
    inputs = draw(setting)
    make_selector("matryoshka", {}).count(inputs.kept, setting.grid)  # not every number is one of whole windows
    return pair(
        "matryoshka",
        inputs,
        lambda: kind.matryoshka_vis_token_process(None, inputs.x, inputs.kept),
        inputs.kept,
    )


def holitom(code: Path, setting: Setting) -> Pair:
    """A video of four frames with as many tokens as one image, half of which stay the same; its parts as its driver
    calls them."""
    kind = load_file(code / "HoliTom/holitom/llava_arch.py").LlavaMetaForCausalLM_holitom
    inputs, cells = draw(setting), math.prod(setting.grid) // FRAMES
    own: Any = type("Holitom", (kind,), {"__abstractmethods__": frozenset()})()
    x = inputs.x[0].view(FRAMES, cells, -1).clone()
    x[:, ::2] = x[:1, ::2] + 0.1 * x[:, ::2]
    scores = ROWS["received"](inputs.state)[0].view(FRAMES, cells)
    selector, share = HoliTom(), 1 / (setting.divisor or 1)

    def run(_: Tensor) -> Tensor:
        unit = F.normalize(x, p=2, dim=-1)
        same = F.cosine_similarity(unit[:-1], unit[1:], dim=-1)
        windows, saved = own.select_static_windows(same, FRAMES, selector.tau, selector.longest)
        ratio = min(share / ((x[..., 0].numel() - saved) / x[..., 0].numel()), 1)
        parts = own.get_static_dynamic_features(x, scores, windows, same, selector.tau)
        static, moving, _, attention, static_places, places = parts
        merged = [
            own.holitom(
                static[i],
                moving[i],
                attention[i],
                static_places[i],
                places[i],
                last - first + 1,
                ratio,
                0.0,
                selector.beta,
                selector.k,
                x.dtype,
                "one_token",
            )
            for i, (first, last) in enumerate(windows)
        ]
        return torch.cat(merged).unsqueeze(0)

    def ours(_: Tensor) -> Selection:
        return selector.choose_video(Features(x, (2, cells // 2), scores), share)

    with torch.inference_mode():
        equal = found_equal(run(x), ours(x).tokens, "tokens")
    return Pair(run, ours, x, equal)


OWN: dict[str, int | None] = {"its own": None}
ONE_BY_ONE = "official: one token at a time"

SELECTIONS: dict[str, Official] = {
    "visionzip": Official("VisionZip", "3151f6d", visionzip, "official: is handed the attention map"),
    "prumerge": Official("LLaVA-PruMerge", "097c041", prumerge, ONE_BY_ONE, {**SHARES, **OWN}),
    "prumerge_plus": Official(
        "LLaVA-PruMerge",
        "097c041",
        partial(prumerge, plus=True),
        f"{ONE_BY_ONE}, keeps doubles",
        {**SHARES, **OWN},
    ),
    "divprune": Official("divprune", "799e2d9", divprune),
    "cdpruner": Official("CDPruner", "9541616", cdpruner, "with the relevance to a text"),
    "aim": Official("AIM", "edc24e9", aim),
    "recoverable": Official(
        "Recoverable-Compression",
        "d927594",
        recoverable,
        f"{ONE_BY_ONE}, outliers by scikit-learn, keys of other patches",
        OWN,
    ),
    "matryoshka": Official("matryoshka-mm", "ec30cd3", matryoshka),
    "holitom": Official(
        "HoliTom", "e9b2972", holitom, "a video of 4 frames of N / 4 tokens, half of which stay the same"
    ),
}
"""By the name of our method."""
