"""Selectors: which tokens leave a vision tower. A new one is one file here and one line below."""

from effvit.reducers.registry import register_method
from effvit.selectors.base import Choice, Features, Selector
from effvit.selectors.class_attention import ClassAttention
from effvit.selectors.controls import RandomCells, UniformCells
from effvit.selectors.registry import SELECTORS, list_selectors
from effvit.selectors.select import TokenSelector, count_tokens, select_tokens
from effvit.selectors.selection import Packed, Selection

__all__ = [
    "SELECTORS",
    "Choice",
    "ClassAttention",
    "Features",
    "Packed",
    "RandomCells",
    "Selection",
    "Selector",
    "TokenSelector",
    "UniformCells",
    "count_tokens",
    "list_selectors",
    "select_tokens",
]

for _selector in (ClassAttention, RandomCells, UniformCells):
    register_method(_selector)
