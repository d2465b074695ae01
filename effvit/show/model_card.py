"""The card of a model on the Hugging Face Hub, which timm's ``push_to_hf_hub`` writes into the README beside it."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TypeAlias, TypedDict

import timm
from torch import nn

import effvit
from effvit.data.preparation import data_config
from effvit.hosts.host import ReducedHost
from effvit.hosts.surface import Reduced
from effvit.messages import shown
from effvit.protocols import Size
from effvit.reducers import METHODS

__all__ = ["Card", "Family", "families", "model_card"]

Details: TypeAlias = dict[str, "str | list[str] | dict[str, str]"]
"""Heading -> what stands there, as timm writes it: a line, or one for each member."""

USAGE = """\
The package `effvit` registers the name with timm: install it beside timm, and import it first.

```python
import timm
from PIL import Image

import effvit  # registers the names
from effvit.data.preparation import load_images

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
images = load_images(model, [Image.open("image.jpg")])  # (1, {channels}, {height}, {width})
scores = model(images)
(features,) = model.forward_intermediates(images, indices=1, intermediates_only=True)  # (1, C, H, W)
```"""


class Card(TypedDict):
    """What timm's ``push_to_hf_hub`` takes as ``model_card``: parts of the README, under timm's names."""

    tags: list[str]
    license: str
    description: str
    details: Details
    usage: str
    citation: list[str]


@dataclass(frozen=True)
class Family:
    """What is said of a method or an architecture wherever one of its models goes, in Markdown.

    Attributes:
        title: Its name as the authors write it.
        paper: A link to the paper; None without one.
        bibtex: The paper's BibTeX entry; None without a paper.
        code: A link to the official code; None without one.
        code_licence: The licence of that code.
        weights: What to know of weights trained with it; None without anything to say.
        models: Patterns of the names of an architecture; none for a method, whose name is the family's.
    """

    title: str
    paper: str | None = None
    bibtex: str | None = None
    code: str | None = None
    code_licence: str | None = None
    weights: str | None = None
    models: Sequence[str] = ()


@cache
def families() -> dict[str, Family]:
    """All families by the names of their cards; tools/make_model_cards.py writes the file from what those say."""
    entries = json.loads(files("effvit.show").joinpath("families.json").read_text(encoding="utf-8"))
    return {name: Family(**entry) for name, entry in entries.items()}


def model_card(model: nn.Module, repo_id: str, *, license: str) -> Card:
    """The card of a model of this package, for ``timm.models.push_to_hf_hub(model, repo_id, model_card=...)``.

    It says what the model is and how it is loaded. What it was trained on and what it reaches, only its owner knows:
    the result is a plain dict to add to, such as ``card["details"]["Dataset"] = "imagenet-1k"``.

    Args:
        model: A reduced model, or one of an architecture of this package.
        repo_id: Where it will be, "user/name".
        license: The licence of its weights as the Hub abbreviates it, e.g. "apache-2.0", "cc-by-nc-4.0" or "other".
            There is no default, since the licence of weights follows from those that they were trained from.

    Raises:
        ValueError: A model that is not of this package, a ``repo_id`` of another form, or no licence.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be 'user/name', got {shown(repo_id)}; the card shows how to load from there")
    if not license.strip():
        raise ValueError(f"license must name the licence of the weights, e.g. 'apache-2.0', got {license!r}")
    own = _families_of(model)
    channels, height, width = data_config(model)["input_size"]
    details: Details = {"Model stats": _stats(model, (height, width))}
    if isinstance(model, Reduced):
        details["Reduction"] = _reduction(model)
    details |= {
        "Papers": [family.paper for family in own if family.paper is not None],
        "Official code": [family.code for family in own if family.code is not None],
        "Licences": _licences(own, license),
        "Saved with": f"effvit {effvit.__version__}, timm {timm.__version__}",
    }
    return {
        "tags": ["timm", "effvit", *([model.method] if isinstance(model, Reduced) else [])],
        "license": license,
        "description": _description(model, own),
        "details": {heading: text for heading, text in details.items() if text},
        "usage": USAGE.format(repo_id=repo_id, channels=channels, height=height, width=width),
        "citation": [family.bibtex for family in own if family.bibtex is not None],
    }


def _families_of(model: nn.Module) -> list[Family]:
    """The method of a model and its architecture, those of them that have a card.

    Raises:
        ValueError: A model that is not of this package.
    """
    name: str = getattr(model, "pretrained_cfg", {}).get("architecture", "")
    known = families()
    own: list[Family] = []
    if isinstance(model, Reduced):
        name = model.host_name or ""
        own = [known[model.method]] if model.method in known else []
    own += [
        family
        for family in known.values()
        if any(fnmatch.fnmatchcase(name.partition(".")[0], pattern) for pattern in family.models)
    ]
    if not own and not isinstance(model, Reduced):
        raise ValueError(
            f"model_card describes reduced models and effvit's architectures, got a {type(model).__name__}; reduce it "
            "by effvit.sparsify, or write the dict that timm.models.push_to_hf_hub takes yourself"
        )
    return own


def _host(model: Reduced) -> str:
    return model.host_name or type(model).__bases__[-1].__name__


def _description(model: nn.Module, own: Sequence[Family]) -> str:
    if isinstance(model, Reduced):
        title = own[0].title if model.method in families() else model.method
        return (
            f"`{_host(model)}` that computes fewer tokens by {title}: {METHODS[model.method].summary}. Made with "
            "`effvit.sparsify`."
        )
    name = getattr(model, "pretrained_cfg", {})["architecture"]
    return f"`{name}`, {own[0].title} as the package `effvit` implements it."


def _stats(model: nn.Module, size: Size) -> dict[str, str]:
    stats = {
        "Params (M)": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}",
        "Image size": f"{size[0]} x {size[1]}",
    }
    if isinstance(model, ReducedHost):
        most = "at most " if model.variable_length else ""
        start = model.patch_embed.num_patches
        stats["Patch tokens"] = f"{start} in an image, {most}{model.token_counts()[-1]} behind the last block"
    return stats


def _reduction(model: Reduced) -> dict[str, str]:
    settings = {name: json.dumps(value) for name, value in model.settings.items()}
    return {"host": f"`{_host(model)}`", "method": f"`{model.method}`", **settings, "recover": f'"{model.recover}"'}


def _licences(own: Sequence[Family], license: str) -> dict[str, str]:
    licences = {"weights": license, "effvit": "Apache-2.0, all code is its own"}
    for family in own:
        if family.code_licence is not None:
            licences[f"official code of {family.title}"] = f"{family.code_licence}. {family.weights or ''}".rstrip()
    return licences
