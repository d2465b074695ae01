"""Every trainable parameter gets a gradient, however a model is used: what DistributedDataParallel asks for.

DDP without ``find_unused_parameters`` stops at the second step of a model in which a parameter got none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from architectures import SIZES, SMALL, make_architecture, make_images
from hosts import HOSTS, MERGE, SETTINGS
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

import effvit
from effvit.block import with_gradients

HOST_METHODS = [
    ("class_token", "evit", "last"),
    ("class_token", "evit", "attention"),
    ("distilled", "tome", "last"),
    ("average_pool", "gtp", "attention"),
    ("attention_pool", "tome", "nearest"),
    ("eva02", "zero_tprune", "attention"),
    ("dinov3", "ats", "attention"),
    ("registers", "hot", "zero"),
    ("class_token", "expedite", "reconstruct"),
    ("lvvit", "dymu", "last"),
]
# The narrow dense STViT-R, whose maps each have a norm of their own.
DENSE = "stvit_r_swin_tiny_patch4_window7_dense"
NARROW: dict[str, Any] = {"embed_dim": 24, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 6, 1), "num_classes": 5}


def without_gradient(model: nn.Module, outputs: Any) -> list[str]:
    """Names of the trainable parameters that a loss of all outputs does not reach."""
    tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    sum(y.square().sum() for y in tensors).backward()  # type: ignore[union-attr]
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def reduced(host: str, method: str, recover: str) -> Any:
    torch.manual_seed(0)
    return effvit.sparsify(HOSTS[host](), method, recover=recover, **SETTINGS[method]).train()


def host_images(host: str) -> Tensor:
    size = (64, 80) if host == "lvvit" else (48, 64)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("host", "method", "recover"), HOST_METHODS)
class TestHosts:
    def test_classifier(self, host: str, method: str, recover: str) -> None:
        model = reduced(host, method, recover)
        assert without_gradient(model, model(host_images(host))) == []

    @pytest.mark.parametrize("norm", [False, True])
    def test_features(self, host: str, method: str, recover: str, norm: bool) -> None:
        model = FeatureGetterNet(reduced(host, method, recover), out_indices=(1, 3), norm=norm).train()
        assert without_gradient(model, model(host_images(host))) == []


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("indices", [(0, 1), (-1,)])
def test_features_of_architectures(case: str, indices: tuple[int, ...]) -> None:
    model = FeatureGetterNet(make_architecture(case), out_indices=indices).train()
    assert without_gradient(model, model(make_images(case))) == []


@pytest.mark.parametrize("case", ["lookupvit", "stvit"])
def test_normalised_features_of_soft_token_models(case: str) -> None:
    model = make_architecture(next(name for name in SMALL if name.startswith(case))).train()
    model.prune_intermediate_layers([0], prune_norm=False)
    images = make_images(next(name for name in SMALL if name.startswith(case)))
    maps = model.forward_intermediates(images, indices=[0], norm=True, intermediates_only=True)
    assert without_gradient(model, maps) == []


def test_dense_stvit_r_as_a_classifier_and_as_a_backbone() -> None:
    for settings in ({}, {"features_only": True}, {"features_only": True, "out_indices": (0, 2)}):
        model = timm.create_model(DENSE, **NARROW, **settings).train()
        assert without_gradient(model, model(torch.randn(2, 3, 64, 64))) == []


@pytest.mark.parametrize("case", SMALL)
def test_backbones_of_detectors(case: str) -> None:
    openmmlab = pytest.importorskip("effvit.dense.openmmlab", reason="the mm extra is not installed")
    name, args = SMALL[case]
    settings = {key: value for key, value in args.items() if key != "num_classes"}
    for out_norm in (False, True):
        model = openmmlab.EffViT(name, out_indices=(0, 1), **({"out_norm": out_norm} | settings)).train()
        assert without_gradient(model, model(torch.randn(2, args.get("in_chans", 3), *SIZES[case][0]))) == []


def test_a_gradient_of_zero_reads_no_value() -> None:
    module, x = nn.Linear(3, 2), torch.ones(2, requires_grad=True)
    nn.init.constant_(module.weight, float("nan"))
    y = with_gradients(x, module)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(module.weight.grad, torch.zeros(2, 3))
    assert with_gradients(x, None) is x


DDP = """
import os, sys, timm, torch, effvit
from torch.nn.parallel import DistributedDataParallel
os.environ.update(RANK="0", WORLD_SIZE="1")
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)

class Maps(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x):
        return self.model.forward_intermediates(x, indices=[0], norm=True, intermediates_only=True)[0]

small = dict(depth=2, embed_dim=24, num_heads=2, img_size=32)
lookup = timm.create_model("lookupvit_small_patch16_224", compressed_grid=2, **small)
lookup.prune_intermediate_layers([0], prune_norm=False)
swin = dict(embed_dim=24, num_heads=(1, 2, 4, 8), depths=(1, 1, 6, 1), num_classes=5)
for model in (
    Maps(lookup),
    timm.create_model("stvit_r_swin_tiny_patch4_window7_dense", **swin),
    timm.create_model("evit_deit_tiny_patch16_224", recover="attention", reduce_at=(1,), **small),
):
    wrapped = DistributedDataParallel(model.train())
    for step in range(2):
        wrapped(torch.randn(2, 3, 32, 32)).sum().backward()
print("three models, two steps each")
"""


def test_two_steps_under_ddp(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", DDP, str(tmp_path / "store")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "three models, two steps each" in run.stdout


def test_merging_methods_refuse_a_recovery_that_would_not_learn() -> None:
    for method in sorted(MERGE):
        with pytest.raises(ValueError, match="recover 'attention' would have nothing to learn"):
            effvit.sparsify(HOSTS["class_token"](), method, recover="attention", **SETTINGS[method])
