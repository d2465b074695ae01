"""Methods from outside the package: those of docs/write_a_method.md, from a folder that is installed beside effvit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.hosts.host import HOST_CLASSES, ReducedEva, ReducedViT
from effvit.hosts.stages import MERGED, Stage
from effvit.layers.macs import Terms, convolutions, layers
from effvit.measure.closed_form import closed_form_macs
from effvit.protocols import Size
from effvit.reducers import METHODS, EViT
from effvit.show.token_stages import trace_stages

PAGE = Path(__file__).resolve().parents[1] / "docs" / "write_a_method.md"
ENTRY_POINTS = """[effvit.methods]
normdrop = outside:NormDrop
learneddrop = outside:LearnedDrop
outstanding = outside:Outstanding
broken = outside:Missing
"""
LEARNT_CONTRACT = """
@effvit.testing.parametrize("learneddrop", hosts=["class_token"])
class TestLearnedDrop(effvit.testing.Contract):
    pass
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds the methods of the page, with their entry points."""
    folder = tmp_path_factory.mktemp("site")
    methods, tests = [], []
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (tests if "Contract" in block else methods).append(block)
    (folder / "outside.py").write_text("\n".join(methods))
    (folder / "test_outside.py").write_text("\n".join([*tests, LEARNT_CONTRACT]))
    info = folder / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def run(site: Path, code: str) -> str:
    """What a fresh interpreter prints that sees the folder."""
    path = os.pathsep.join([str(site), str(PAGE.parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_installed_methods_are_there_after_import_and_a_broken_one_is_named(site: Path) -> None:
    out = run(
        site, "import effvit, timm; print(effvit.list_methods()[-2:], timm.is_model('normdrop_deit_tiny_patch16_224'))"
    )
    assert "['normdrop', 'learneddrop'] True" in out
    assert "the method 'broken' of outside:Missing is left out: AttributeError" in out


EVERYTHING = """
import timm, torch, effvit
from pathlib import Path
from effvit.measure.closed_form import closed_form_macs
from effvit.measure.tune import families
from effvit.show.visualize import token_figure
from PIL import Image
host = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=3, img_size=64, num_classes=5).eval()
images = torch.randn(2, 3, 64, 64)
model = effvit.sparsify(host, "normdrop", keep_rate=0.5).eval()
assert model.token_counts() == [16, 8, 8, 8]
assert model.settings == {"keep_rate": 0.5}
assert [tuple(y.shape) for y in model.forward_intermediates(images, intermediates_only=True)] == [(2, 48, 4, 4)] * 4
report = effvit.count_flops(model, (3, 64, 64), strict=True)
assert sum(closed_form_macs(model, (3, 64, 64)).values()) == report.total
assert torch.equal(effvit.sparsify(host, "normdrop", keep_rate=1.0).eval()(images), host(images))
assert families(host, ["normdrop"])[0].ladder[0] == {"keep_rate": 0.9}
assert token_figure(model, Image.new("RGB", (64, 64), "red")).width > 64
model.set_keep_rate(0.25)
assert model.settings == {"keep_rate": 0.25}
import outside
scaled = outside.ScaledViT(img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=5).eval()
mean = effvit.sparsify(scaled, "normdrop", keep_rate=0.5, recover="mean")
features, tokens = mean.trace_tokens(images)[-1]
last = mean.forward_intermediates(images, indices=1, intermediates_only=True)[0].flatten(2).transpose(1, 2)
dropped = tokens.source < 0
assert dropped.sum(1).tolist() == [8, 8]
assert torch.allclose(last[dropped], features[:, 1:].mean(1).repeat_interleave(8, 0))
named = timm.create_model("normdrop_deit_tiny_patch16_224", depth=4, keep_rate=0.5, features_only=True)
assert named(torch.randn(1, 3, 224, 224))[-1].shape == (1, 192, 14, 14)
"""


@pytest.mark.slow
def test_all_that_the_package_offers_works_for_a_method_from_outside(site: Path) -> None:
    """Expected are the numbers of the page's class: ceil(0.5 * 16) tokens from block 1 on."""
    run(site, EVERYTHING)


SELECTING = """
import timm, torch, effvit
from effvit.cli import main
from effvit.measure.closed_form import closed_form_macs
from effvit.show.token_stages import trace_stages
tower = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=3, img_size=64, num_classes=5).eval()
images = torch.randn(2, 3, 64, 64)
chosen = effvit.select_tokens(tower, images, "outstanding", keep=5, power=2.0)
dense = tower.forward_intermediates(images, indices=[-2], norm=False, intermediates_only=True, output_fmt="NLC")[0]
expected = (chosen.scores * dense.norm(dim=-1) ** 2).topk(5).indices.sort().values
assert torch.equal(chosen.ids, expected)
assert effvit.count_tokens("outstanding", (4, 4), keep=0.5) == 8
module = effvit.TokenSelector(tower, "outstanding", keep=5).eval()
report = effvit.count_flops(module, (3, 64, 64), strict=True)
assert sum(closed_form_macs(module, (3, 64, 64)).values()) == report.total
assert trace_stages(module, images[:1])[0].tokens == 5
assert main(["list", "outstanding"]) == 0
"""


def test_a_selector_from_outside_works_as_those_of_the_package(site: Path) -> None:
    """Expected is what the page's class says: the largest products of attention and norm, of timm's own features."""
    assert "outstanding\tselector\tpower=1.0" in run(site, SELECTING)


LEARNING = """
import copy, timm, torch, effvit
host = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=3, img_size=64, num_classes=5)
model = effvit.sparsify(host, "learneddrop").train()
images = torch.randn(2, 3, 64, 64)
model.set_grad_checkpointing()
model(images).sum().backward()
score = model.blocks[2].reducer.score
assert score.weight.grad.abs().sum() > 0
with torch.no_grad():
    score.weight.sub_(score.weight.grad)
model.eval()
other = effvit.sparsify(effvit.sparsify(timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=3,
    img_size=64, num_classes=5), "learneddrop"), "learneddrop").eval()
other.load_state_dict(model.state_dict())
again = effvit.sparsify(model, "learneddrop").eval()
for same in (copy.deepcopy(model), other, again):
    assert torch.equal(same(images), model(images))
assert again.blocks[2].reducer.score.weight is score.weight
timm.models.save_for_hf(model, "saved")
back = timm.create_model("local-dir:saved", pretrained=True).eval()
assert torch.equal(back(images), model(images))
assert back.blocks[2].reducer.score.weight.equal(score.weight)
"""


@pytest.mark.slow
def test_a_method_with_parameters_trains_and_comes_back(site: Path, tmp_path: Path) -> None:
    run(site, f"import os; os.chdir({str(tmp_path)!r})\n{LEARNING}")


@pytest.mark.slow
def test_the_contract_runs_on_methods_from_outside(site: Path) -> None:
    """The page's test class, and one for the method with parameters, on one of the hosts."""
    arguments = ["-q", "-p", "no:cacheprovider", "-k", "class_token", str(site)]
    out = run(site, f"import pytest, sys; sys.exit(pytest.main({arguments!r}))")
    assert re.search(r"^[1-9]\d+ passed, ", out, re.MULTILINE), out


class TestHosts:
    @pytest.fixture
    def host_class(self) -> Iterator[type[VisionTransformer]]:
        """A host of one's own, forgotten afterwards."""

        class Mine(VisionTransformer):
            def _pos_embed(self, x: Tensor) -> Tensor:
                return super()._pos_embed(x) * 2

        yield Mine
        HOST_CLASSES.pop(Mine, None)

    def test_a_host_that_adds_to_its_base_is_reduced_with_what_it_adds(self, host_class: Any) -> None:
        small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
        assert effvit.register_host(host_class) is effvit.register_host(host_class) is host_class
        mine = host_class(**small).eval()
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(effvit.sparsify(mine, "tome", r=0)(x), mine(x))
        plain = VisionTransformer(**small).eval()
        plain.load_state_dict(mine.state_dict())
        with torch.no_grad():
            assert not torch.equal(effvit.sparsify(mine, "tome", r=2)(x), effvit.sparsify(plain, "tome", r=2)(x))
        with pytest.raises(TypeError, match=r"ReducedMine has no closed form"):
            closed_form_macs(effvit.sparsify(mine, "tome", r=2), (3, 32, 32))

    def test_a_forward_pass_of_its_own_needs_a_reduced_class(self) -> None:
        class Other(VisionTransformer):
            def forward_features(self, x: Tensor) -> Tensor:
                return x

        with pytest.raises(TypeError, match="Other overrides forward_features, which a reduced model runs in its own"):
            effvit.register_host(Other)
        with pytest.raises(TypeError, match=r"must be a subclass of ReducedViT and .*Other, got ReducedViT"):
            effvit.register_host(Other, ReducedViT)
        with pytest.raises(TypeError, match=r"cannot reduce the tokens of a torch\.nn.*Linear"):
            effvit.register_host(torch.nn.Linear)
        with pytest.raises(ValueError, match="VisionTransformer is registered already, with ReducedViT"):
            effvit.register_host(VisionTransformer, ReducedEva)


def test_a_fill_of_a_known_name_is_refused() -> None:
    with pytest.raises(ValueError, match="the fill 'last' is known already; give it another name than last, nearest"):
        effvit.register_fill("last", effvit.to_map)


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"name": "evit"}, ValueError, r"the method 'evit' is registered already, as effvit\.reducers\.evit\.EViT"),
            ({"name": "My Method"}, ValueError, "a word in lower case, got 'My Method'"),
            ({"name": "mine", "forward": lambda self: None}, TypeError, "overrides forward"),
            ({"name": "mine", "off": effvit.Reducer.off}, TypeError, "does not define off"),
            ({"name": "mine", "summary": None}, TypeError, "has no summary"),
        ],
    )
    def test_what_is_no_method_is_named(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        before = dict(METHODS)
        with pytest.raises(error, match=message):
            effvit.register_method(type("Mine", (EViT,), change))
        assert before == METHODS

    def test_a_setting_that_means_something_else_is_named(self) -> None:
        class Mine(EViT):
            name = "mine"

            @classmethod
            def plan(cls, depth: int, *, img_size: int = 3) -> Any:  # type: ignore[override]
                return {}

        with pytest.raises(ValueError, match="has a setting 'img_size', which effvit"):
            effvit.register_method(Mine)
        with pytest.raises(TypeError, match=r"a method is a subclass of effvit\.Reducer, got 'evit'"):
            effvit.register_method("evit")  # type: ignore[type-var]

    def test_the_same_class_may_come_again(self) -> None:
        assert effvit.register_method(EViT) is EViT


class PooledPatches(nn.Module):
    """An architecture from outside: a mean over each two neighbouring patches, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).unflatten(3, (-1, 2)).mean((2, 3, 4)))

    def closed_form(self, size: Size) -> Terms:
        terms, _ = convolutions("embedding", self.embed, size)
        return terms + layers("head", self.head, 1)

    def trace_stages(self, x: Tensor) -> list[Stage]:
        height, width = x.shape[2] // 4, x.shape[3] // 4
        labels = torch.arange(height * width // 2).repeat_interleave(2).unflatten(0, (height, width))
        return [Stage(0, height * width // 2, labels.numpy())]


def test_an_architecture_from_outside_tells_its_closed_form_and_its_tokens() -> None:
    model, x = PooledPatches(), torch.randn(1, 3, 16, 24)
    counted = effvit.count_flops(model, (3, 16, 24))
    assert sum(closed_form_macs(model, (3, 16, 24)).values()) == counted.total
    (stage,) = trace_stages(model, x)
    assert stage.tokens == 12
    assert (stage.states == MERGED).all()
