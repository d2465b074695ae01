"""The reduction methods. A new method is one file here and one line below."""

from effvit.reducers.algm import ALGM
from effvit.reducers.atc import ATC
from effvit.reducers.ats import ATS
from effvit.reducers.base import Reducer
from effvit.reducers.cubistmerge import CubistMerge
from effvit.reducers.diffrate import DiffRate
from effvit.reducers.dpcknn import DPCKNN
from effvit.reducers.dymu import DyMU
from effvit.reducers.dynamicvit import DynamicViT
from effvit.reducers.evit import EViT
from effvit.reducers.expedite import Expedite
from effvit.reducers.gtp import GTP
from effvit.reducers.hot import HoT
from effvit.reducers.kmedoids import KMedoids
from effvit.reducers.mctf import MCTF
from effvit.reducers.patchmerger import PatchMerger
from effvit.reducers.pitome import PiToMe
from effvit.reducers.registry import METHODS, register_method
from effvit.reducers.sinkhorn import Sinkhorn
from effvit.reducers.static_selection import Radial, Random, Uniform
from effvit.reducers.tome import ToMe
from effvit.reducers.vid_tldr import VidTLDR
from effvit.reducers.zero_tprune import ZeroTPrune

__all__ = [
    "ALGM",
    "ATC",
    "ATS",
    "DPCKNN",
    "GTP",
    "MCTF",
    "METHODS",
    "CubistMerge",
    "DiffRate",
    "DyMU",
    "DynamicViT",
    "EViT",
    "Expedite",
    "HoT",
    "KMedoids",
    "PatchMerger",
    "PiToMe",
    "Radial",
    "Random",
    "Reducer",
    "Sinkhorn",
    "ToMe",
    "Uniform",
    "VidTLDR",
    "ZeroTPrune",
    "register_method",
]

for _method in (
    EViT,
    ToMe,
    GTP,
    ATS,
    ZeroTPrune,
    DyMU,
    ALGM,
    DynamicViT,
    DiffRate,
    Expedite,
    HoT,
    PiToMe,
    MCTF,
    VidTLDR,
    CubistMerge,
    DPCKNN,
    KMedoids,
    Sinkhorn,
    PatchMerger,
    ATC,
    Random,
    Uniform,
    Radial,
):
    register_method(_method)
