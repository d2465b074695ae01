"""Selectors: which tokens leave a vision tower. A new one is one file here and one line below."""

from effvit.reducers.registry import register_method
from effvit.selectors.aim import AIM
from effvit.selectors.base import Choice, Features, Selector
from effvit.selectors.cdpruner import CDPruner
from effvit.selectors.class_attention import ClassAttention
from effvit.selectors.controls import RandomCells, UniformCells
from effvit.selectors.crops import CropSelector
from effvit.selectors.divprune import DivPrune
from effvit.selectors.globalcom2 import GlobalCom2
from effvit.selectors.hired import HiRED
from effvit.selectors.holitom import HoliTom
from effvit.selectors.llava_mini import QueryPooler
from effvit.selectors.matryoshka import Matryoshka, MatryoshkaLoss
from effvit.selectors.parts import Parts, PartSelector, SelectedParts, select_parts
from effvit.selectors.prumerge import PruMerge, PruMergePlus
from effvit.selectors.recoverable import Recoverable
from effvit.selectors.registry import SELECTORS, list_selectors
from effvit.selectors.select import SelectingTower, TokenSelector, count_tokens, select_tokens
from effvit.selectors.selection import Packed, Selection
from effvit.selectors.todre import ToDRE
from effvit.selectors.video import VideoSelector, select_video
from effvit.selectors.visionzip import VisionZip

__all__ = [
    "AIM",
    "SELECTORS",
    "CDPruner",
    "Choice",
    "ClassAttention",
    "CropSelector",
    "DivPrune",
    "Features",
    "GlobalCom2",
    "HiRED",
    "HoliTom",
    "Matryoshka",
    "MatryoshkaLoss",
    "Packed",
    "PartSelector",
    "Parts",
    "PruMerge",
    "PruMergePlus",
    "QueryPooler",
    "RandomCells",
    "Recoverable",
    "SelectedParts",
    "SelectingTower",
    "Selection",
    "Selector",
    "ToDRE",
    "TokenSelector",
    "UniformCells",
    "VideoSelector",
    "VisionZip",
    "count_tokens",
    "list_selectors",
    "select_parts",
    "select_tokens",
    "select_video",
]

for _selector in (
    ClassAttention,
    VisionZip,
    PruMerge,
    PruMergePlus,
    DivPrune,
    CDPruner,
    ToDRE,
    AIM,
    Recoverable,
    HiRED,
    GlobalCom2,
    HoliTom,
    Matryoshka,
    QueryPooler,
    RandomCells,
    UniformCells,
):
    register_method(_selector)
