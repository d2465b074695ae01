"""A model comes back as itself: every way to save it x every kind of model, bit for bit, or an error that says why.

The expectation is the model itself: the same outputs on fixed images and, where it is reduced, the same settings. Every
method and every host has its part in each run, each with each in one with ``-m release``. How many of all combinations
are right, refused and wrong is printed by ``python tests/test_comes_back.py``.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
import timm
import torch
from architectures import SIZES, SMALL, make_architecture
from hosts import PAIRS, SETTINGS, covered, covering, make_host, make_model, released
from hosts import make_images as images_of
from hub_stub import put_up
from safetensors.torch import load_file, save_file
from timm.models import push_to_hf_hub, save_for_hf
from torch import Tensor, nn

import effvit
from effvit.hosts.host import HOST_CLASSES
from effvit.hosts.surface import SPARSIFIED, Reduced
from effvit.reducers import METHODS, Reducer
from effvit.reducers.keep_rate import ImageShare
from effvit.show.model_card import model_card

# timm's names of hosts; the numbers make them small. Half have a name under each method in the zoo, half have none.
NARROW = {"depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
HOSTS: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": NARROW | {"img_size": 96},
    "deit_tiny_distilled_patch16_224": NARROW | {"img_size": 96},
    "vit_base_patch16_siglip_224": NARROW | {"img_size": (96, 64)},
    "vit_small_patch16_dinov3": NARROW | {"img_size": 96},
    "eva02_tiny_patch14_336": NARROW | {"img_size": 84},
    "beit_base_patch16_224": NARROW | {"img_size": 96},
    "vit_relpos_small_patch16_rpn_224": NARROW | {"img_size": (96, 64)},
    "lvvit_small_patch16_224": NARROW | {"img_size": 96},
    "vit_nano_patch4_28": {"depth": 4, "embed_dim": 48},
    "vit_medium_patch16_reg4_gap_256": NARROW | {"img_size": 96},
    "vit_small_patch16_rope_mixed_224": NARROW | {"img_size": 96},
    "naflexvit_base_patch16_gap": NARROW,
    "tiny_vit_5m_224": {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)},
    "samvit_base_patch16": {
        "img_size": (96, 80),
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "global_attn_indexes": (1,),
        "window_size": 4,
        "num_classes": 5,
    },
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2)},
    "swinv2_tiny_window8_256": {"img_size": 64, "embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2)},
    "hiera_tiny_224": {"embed_dim": 8, "stages": (1, 2, 2, 1)},
    "sam2_hiera_tiny": {"embed_dim": 8, "stages": (1, 2, 3, 1), "global_att_blocks": (5,)},
}
WITH_WINDOWS = {
    *("tiny_vit_5m_224", "samvit_base_patch16", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"),
    *("hiera_tiny_224", "sam2_hiera_tiny"),
}
NO_CLASS_TOKEN = {
    "vit_base_patch16_siglip_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_relpos_small_patch16_rpn_224",
    "naflexvit_base_patch16_gap",
}
WINDOWS = {"tome", "expedite"}  # what they take


def fits(method: str, host: str) -> bool:
    if host in WITH_WINDOWS:
        return method in WINDOWS
    return not (METHODS[method].needs_class_token and host in NO_CLASS_TOKEN)


LIVE = [(method, host) for method in SETTINGS for host in HOSTS if fits(method, host)]


def settings_of(method: str, host: str) -> dict[str, Any]:
    if host not in WITH_WINDOWS:
        return SETTINGS[method]
    return {"r": 3} if method == "tome" else {"keep_rate": 0.3}


def shaken(model: nn.Module) -> nn.Module:
    """The model with weights far enough from their initialisation that attention differs between tokens."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise / max(1, parameter.ndim) ** 0.5)
    return model.eval()


def host_of(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return shaken(timm.create_model(name, **(HOSTS[name] | kwargs)))


def live(method: str, host: str, **kwargs: Any) -> nn.Module:
    return effvit.sparsify(host_of(host), method, **(settings_of(method, host) | kwargs)).eval()


def pictures(model: Any, batch: int = 2) -> Tensor:
    """Fixed images (B, C, H, W) of the size the model is for."""
    patch_embed = getattr(model, "model", model).patch_embed
    size = getattr(patch_embed, "img_size", (224, 224))
    return torch.randn(batch, getattr(model, "in_chans", 3), *size, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = model(x)
    return list(y) if isinstance(y, (list, tuple)) else [y]


def assert_same(own: Any, other: Any, x: Tensor) -> None:
    assert all(torch.equal(a, b) for a, b in zip(outputs(own, x), outputs(other, x), strict=True))
    own, other = getattr(own, "model", own), getattr(other, "model", other)
    if isinstance(own, Reduced):
        assert (other.method, other.recover, other.settings) == (own.method, own.recover, own.settings)


# -- ways to save a model and get it back ------------------------------------------------------------------


def hub_folder(model: nn.Module, folder: Path) -> nn.Module:
    save_for_hf(model, str(folder))
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def hub_folder_of_safetensors(model: nn.Module, folder: Path) -> nn.Module:
    save_for_hf(model, str(folder), safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def hub_address(model: nn.Module, folder: Path) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        hub = put_up(folder, patch)
        push_to_hf_hub(model, "someone/model", model_card=model_card(model, "someone/model", license="mit"))
        return timm.create_model("hf-hub:someone/model", pretrained=True, cache_dir=hub.cache).eval()


def pickled(model: nn.Module, folder: Path) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def whole_file(model: nn.Module, folder: Path) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def deep_copy(model: nn.Module, folder: Path) -> nn.Module:
    return copy.deepcopy(model)


def weights(model: nn.Module, folder: Path, other: nn.Module) -> nn.Module:
    other.load_state_dict(model.state_dict())
    return other


def weights_of_safetensors(model: nn.Module, folder: Path, other: nn.Module) -> nn.Module:
    save_file(model.state_dict(), folder / "weights.safetensors")
    other.load_state_dict(load_file(folder / "weights.safetensors"))
    return other


def checkpoint(model: nn.Module, folder: Path, other: nn.Module) -> nn.Module:
    torch.save({"state_dict": model.state_dict()}, folder / "last.pth")
    effvit.load_checkpoint(other, folder / "last.pth")
    return other


def checkpoint_path(model: Any, folder: Path) -> nn.Module:
    """The weights in a file, the rest in keywords of ``timm.create_model``, which the model tells."""
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "last.pth")
    name, args = model.pretrained_cfg["architecture"], timm.models.get_model_args(model)
    return timm.create_model(name, checkpoint_path=str(folder / "last.pth"), **args).eval()


def pretrained_cfg_overlay(model: Any, folder: Path) -> nn.Module:
    """As ``checkpoint_path``, with the file as pretrained weights."""
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "last.pth")
    name, args = model.pretrained_cfg["architecture"], timm.models.get_model_args(model)
    overlay = {"file": str(folder / "last.pth"), "num_classes": model.num_classes}  # timm drops heads of other classes
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()


WHOLE = (hub_folder, hub_folder_of_safetensors, hub_address, pickled, whole_file, deep_copy)  # the file tells the model
BY_KEYWORDS = (checkpoint_path, pretrained_cfg_overlay)
BY_WEIGHTS = (weights, weights_of_safetensors, checkpoint)  # into a fresh host, reduced by the settings the model tells


def again(model: Any, dense: nn.Module) -> nn.Module:
    """Another host with random weights, reduced as the model says it is."""
    return effvit.sparsify(dense, model.method, recover=model.recover, **model.settings).eval()


# -- kinds of models ---------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Any wrapper of a layer, such as one of LoRA or of quantisation: it has no attribute of the layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def changed(model: Any) -> Any:
    """The model after everything that timm and this package let one change."""
    model.reset_classifier(3)
    height, width = model.patch_embed.img_size
    patch = model.patch_embed.patch_size[0]
    model.set_input_size((height, width + patch))
    if "keep_rate" in model.settings:
        model.set_keep_rate(0.55)
    return shaken(model)


def after_set_keep_rate(method: str) -> nn.Module:
    shares: dict[str, Any] = {"progressive": False} if method == "dynamicvit" else {}  # else it takes one rate alone
    model = live(method, "deit_tiny_patch16_224", **shares)
    reducers = [reducer for reducer in model.reducers.values() if hasattr(reducer, "base_keep_rate")]
    model.set_keep_rate([0.6, 0.9, 0.8, 0.7][: len(reducers)])
    return model


def calibrated() -> nn.Module:
    model = effvit.sparsify(host_of("deit_tiny_patch16_224"), "dymu", r_total=12).eval()
    effvit.calibrate(model, [pictures(model)])
    return model


CURRENT = ("img_size", "num_classes", "global_pool", "in_chans", "dynamic_img_size")
DEIT = "deit_tiny_patch16_224"
OF_THE_IMAGE = [name for name, method in METHODS.items() if issubclass(method, ImageShare)]
BY_EARLIER = [*OF_THE_IMAGE, "dynamicvit", "cubistmerge", "algm"]  # what a block does depends on how many reduce before
# No setting of these lists the blocks that reduce; of a model without one of its reducers, model.settings is an error.
WITHOUT_BLOCKS = [name for name in SETTINGS if "reduce_at" not in METHODS[name].defaults()]
RATES = [method for method in SETTINGS if "keep_rate" in METHODS[method].defaults()]
KINDS: dict[str, tuple[Callable[[], Any], str]] = {  # how it is made, and its host
    **{f"{m} on {h}": (partial(live, m, h), h) for m, h in LIVE},
    **{f"{m} on {h}, changed": (lambda m=m, h=h: changed(live(m, h)), h) for m, h in LIVE if h == DEIT or m == "hot"},
    **{f"{m} after set_keep_rate": (partial(after_set_keep_rate, m), DEIT) for m in RATES},
    "named": (
        lambda: shaken(timm.create_model("evit_deit_tiny_patch16_224", keep_rate=0.6, **HOSTS[DEIT])),
        DEIT,
    ),
    "named, reduced again by another method": (
        lambda: effvit.sparsify(KINDS["named"][0](), "tome", r=2, prop_attn=False).eval(),
        DEIT,
    ),
    "a setting of None": (
        partial(live, "zero_tprune", DEIT, var_range=None),
        DEIT,
    ),
    "trained recovery": (
        lambda: shaken(live("evit", "vit_small_patch16_dinov3", recover="attention")),
        "vit_small_patch16_dinov3",
    ),
    "another fill": (partial(live, "hot", DEIT, recover="nearest"), DEIT),
    "calibrated dymu": (calibrated, DEIT),
    "grey images of any size": (
        lambda: effvit.sparsify(host_of(DEIT, in_chans=1, dynamic_img_size=True), "evit", num_tokens=9).eval(),
        DEIT,
    ),
}


def is_covering(kind: str) -> bool:
    """Whether a kind is in every run: pairs in which all methods and hosts are, and all the rest."""
    method, _, host = kind.removesuffix(", changed").partition(" on ")
    if host not in HOSTS:
        return True
    if kind.endswith(", changed"):
        return host == DEIT
    return (method, host) in covering(LIVE)


COVERING = [kind for kind in KINDS if is_covering(kind)]
EACH = released(KINDS, COVERING)


def test_every_method_and_host_comes_back_in_every_run() -> None:
    pairs = [kind.partition(" on ") for kind in COVERING if kind.endswith(tuple(HOSTS))]
    assert {method for method, _, _ in pairs} == set(METHODS)
    assert {host for _, _, host in pairs} == set(HOSTS)


@pytest.mark.parametrize("kind", EACH)
class TestReducedModel:
    def test_file_gives_the_same_model_back(self, kind: str, tmp_path: Path) -> None:
        model = KINDS[kind][0]()
        for way in (*WHOLE, *BY_KEYWORDS):
            assert_same(model, way(model, tmp_path / way.__name__), pictures(model))

    def test_weights_fit_a_fresh_host_reduced_by_the_settings_it_tells(self, kind: str, tmp_path: Path) -> None:
        make, host = KINDS[kind]
        model = make()
        recorded = timm.models.get_model_args(model)
        args = {name: recorded[name] for name in CURRENT if name in recorded}
        for way in BY_WEIGHTS:
            dense = timm.create_model(host, **(HOSTS[host] | args))
            assert_same(model, way(model, tmp_path, again(model, dense)), pictures(model))

    def test_settings_are_json_and_a_copy(self, kind: str) -> None:
        model = KINDS[kind][0]()
        settings = model.settings
        assert json.loads(json.dumps(settings)) == settings
        settings["keep_rate"] = "anything"
        assert model.settings != settings


@pytest.mark.parametrize("case", SMALL)
def test_architecture_comes_back_after_a_change_of_size_and_classes(case: str, tmp_path: Path) -> None:
    model: Any = make_architecture(case)
    model.set_input_size(SIZES[case][1])
    model.reset_classifier(3)
    shaken(model)
    x = torch.randn(1, 3, *SIZES[case][1], generator=torch.Generator().manual_seed(1))
    for way in (*WHOLE, *BY_KEYWORDS):
        assert_same(model, way(model, tmp_path / way.__name__), x)


def test_cells_of_super_tokens_come_back(tmp_path: Path) -> None:
    model: Any = make_architecture("supertoken")
    model.set_stoken_size((4, 2, 2, 1))
    x = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    assert_same(model, hub_folder(model, tmp_path), x)


@pytest.mark.parametrize("way", WHOLE, ids=lambda way: way.__name__)
def test_features_only_comes_back_or_is_refused_by_timm_as_for_a_dense_model(
    way: Callable[..., Any], tmp_path: Path
) -> None:
    model: Any = timm.create_model(
        "evit_deit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **HOSTS["deit_tiny_patch16_224"]
    ).eval()
    model.model.set_keep_rate(0.3)
    if way in (hub_folder, hub_folder_of_safetensors):
        with pytest.raises(AttributeError, match="num_classes"):
            way(model, tmp_path)
        return
    if way is hub_address:
        with pytest.raises(ValueError, match="got a FeatureGetterNet"):  # by the card, before timm
            way(model, tmp_path)
        return
    assert_same(model, way(model, tmp_path), pictures(model))


def test_pyramid_name_comes_back_with_its_settings(tmp_path: Path) -> None:
    name = effvit.register_pyramid("hot_deit_tiny_patch16_224", keep_rate=0.5)
    model = shaken(timm.create_model(name, **HOSTS["deit_tiny_patch16_224"]))
    assert model.settings["keep_rate"] == 0.5
    assert_same(model, hub_folder(model, tmp_path), pictures(model))


class TestNames:
    def test_zoo_name_is_kept_where_it_describes_the_model(self) -> None:
        model: Any = live("evit", "deit_tiny_patch16_224")
        assert model.pretrained_cfg["architecture"] == "evit_deit_tiny_patch16_224"
        assert effvit.sparsify(model, "tome").pretrained_cfg["architecture"] == "tome_deit_tiny_patch16_224"

    def test_other_hosts_and_settings_have_the_generic_name(self) -> None:
        for model in (live("tome", "vit_nano_patch4_28"), KINDS["a setting of None"][0]()):
            assert model.pretrained_cfg["architecture"] == SPARSIFIED

    def test_host_keeps_its_own_name(self) -> None:
        dense: Any = host_of("deit_tiny_patch16_224")
        effvit.sparsify(dense, "evit")
        assert dense.pretrained_cfg["architecture"] == "deit_tiny_patch16_224"

    def test_host_without_a_name_is_an_error_that_says_what_to_pass(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="'host' is not serializable; provide a model_args replacement"):
            save_for_hf(make_model("tome", "class_token"), str(tmp_path))
        # timm writes weights before it asks what model they are of; what is left in the folder makes no model.
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)

    def test_host_without_a_name_comes_back_with_the_arguments_that_name_it(self, tmp_path: Path) -> None:
        model = make_model("tome", "class_token")
        args = {"host": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
        save_for_hf(model, str(tmp_path), model_args=args)
        assert_same(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), images_of(model))

    @pytest.mark.parametrize(("missing", "given"), [("host", {"method": "tome"}), ("method", {"host": DEIT})])
    def test_generic_name_without_one_of_its_parts_says_what_to_pass(self, missing: str, given: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"needs '{missing}'; give host="):
            timm.create_model(SPARSIFIED, **given)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"host": 5}, "takes host as a string, got 5"),
            ({"settings": ["r"]}, r"takes settings as a dict of the method's settings, got \['r'\]"),
            ({"setting": {"r": 2}}, f"sparsified {DEIT} has no argument 'setting'; did you mean settings?"),
        ],
    )
    def test_keyword_of_the_generic_name_is_refused_in_its_words(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(TypeError, match=message):
            timm.create_model(SPARSIFIED, **({"host": DEIT, "method": "tome"} | NARROW | wrong))

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"method": "tom"}, r"unknown method 'tom'; did you mean tome"),
            ({"method": "tom", "features_only": True}, r"unknown method 'tom'; did you mean tome"),
            ({"method": "x"}, "unknown method 'x'; known are evit, tome"),
            ({"settings": {"rr": 2}}, r"tome has no setting 'rr'; did you mean r\?"),
            ({"settings": {"keep_rate": 0.5}}, "tome has no setting 'keep_rate'; it belongs to evit"),
            ({"settings": {1: 2}}, "tome has no setting 1; tome takes r, prop_attn"),
            ({"host": "deit_tinny_patch16_224"}, "unknown model 'deit_tinny_patch16_224'; did you mean deit_tiny_p"),
            ({"host": "zzz"}, r"unknown model 'zzz'; timm\.list_models\(\) has those that there are"),
            ({"host": "last.pth"}, "'last.pth' names a file or a folder, not an architecture; give a name of timm"),
            ({"host": "hf-hub:me/vit"}, "'hf-hub:me/vit' names a file or a folder, not an architecture"),
            ({"host": SPARSIFIED}, "host must name the model to reduce, got 'sparsified'"),
        ],
    )
    def test_wrong_part_of_the_generic_name_is_answered_as_by_sparsify(
        self, wrong: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            timm.create_model(SPARSIFIED, **({"host": DEIT, "method": "tome"} | NARROW | wrong))

    def test_setting_beside_the_settings_of_the_generic_name_is_refused(self) -> None:
        with pytest.raises(
            TypeError, match=r"takes the settings of tome as a dict, got r beside it; give settings=dict\(r=\.\.\.\)"
        ):
            timm.create_model(SPARSIFIED, host=DEIT, method="tome", r=2, **NARROW)

    def test_generic_name_is_listed_by_timm_alone(self) -> None:
        assert SPARSIFIED in timm.list_models(SPARSIFIED)
        assert SPARSIFIED not in effvit.list_models()

    @pytest.mark.parametrize(
        ("name", "args"),
        [
            ("evit_deit_tiny_patch16_224", {"keep_rate": 0.5, **NARROW}),
            ("lvvit_small_patch16_224", NARROW),
            ("vit_nano_patch4_28", {"depth": 4, "num_heads": 6}),  # of no shape
            SMALL["stvit"],
            SMALL["casvit"],
        ],
    )
    def test_builder_called_without_timm_create_model_records_its_keywords(
        self, name: str, args: dict[str, Any], tmp_path: Path
    ) -> None:
        model: Any = shaken(timm.model_entrypoint(name)(**args))
        size = args.get("img_size", model.pretrained_cfg["input_size"][1:])
        x = torch.randn(1, getattr(model, "in_chans", 3), *size)
        assert_same(model, hub_folder(model, tmp_path / "own"), x)
        if type(model) in HOST_CLASSES:
            reduced = effvit.sparsify(model, "tome", r=2).eval()
            assert_same(reduced, hub_folder(reduced, tmp_path / "reduced"), x)

    def test_recovery_is_new_where_the_file_is_of_the_plain_host(self, tmp_path: Path) -> None:
        host = "vit_small_patch16_dinov3"
        dense = host_of(host)
        torch.save(dense.state_dict(), tmp_path / "dense.pth")
        overlay = {"file": str(tmp_path / "dense.pth"), "num_classes": 5}
        args = {"recover": "attention", **HOSTS[host]}
        model = timm.create_model(f"evit_{host}", pretrained=True, pretrained_cfg_overlay=overlay, **args)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in dense.state_dict().items())
        assert not model.recovery.attn.proj.weight.any()


class TestSettings:
    @pytest.mark.parametrize("method", RATES)
    @pytest.mark.parametrize("rate", [0.55, 1.0])
    def test_settings_follow_set_keep_rate_and_go_back_with_none(self, method: str, rate: float) -> None:
        dense = make_host("class_token")
        model = effvit.sparsify(dense, method, **SETTINGS[method]).eval()
        before = model.settings
        model.set_keep_rate(rate)
        assert model.settings["keep_rate"] == rate
        assert again(model, dense).token_counts() == model.token_counts()
        assert_equal_outputs(model, again(model, dense))
        model.set_keep_rate(None)
        assert model.settings == before

    @pytest.mark.parametrize("method", ["dpcknn", "dynamicvit", "evit", "hot"])
    @pytest.mark.parametrize("rates", [(0.7, 0.5, 1.0), (1.0, 0.7, 0.5), (0.7, 1.0, 0.5)])
    def test_settings_follow_rates_of_which_one_is_1(self, method: str, rates: tuple[float, ...]) -> None:
        dense = make_host("class_token")
        shares: dict[str, Any] = {"progressive": False} if method == "dynamicvit" else {}
        model = effvit.sparsify(dense, method, **SETTINGS[method] | {"reduce_at": (1, 2, 3)} | shares).eval()
        model.set_keep_rate(rates)
        assert again(model, dense).token_counts() == model.token_counts()
        assert_equal_outputs(model, again(model, dense))

    def test_rates_of_blocks_that_reduce_are_told_with_those_blocks(self) -> None:
        dense = make_host("class_token")
        model = effvit.sparsify(dense, "evit", keep_rate=[1.0, 0.7, 0.5], reduce_at=(0, 1, 2))
        model.set_keep_rate([0.6, 0.9])
        assert model.settings["keep_rate"] == [0.6, 0.9]
        assert model.settings["reduce_at"] == [1, 2]
        assert_equal_outputs(model.eval(), again(model, dense))

    @pytest.mark.parametrize(("method", "host"), covered(PAIRS))
    def test_settings_make_the_same_model_of_every_host(self, method: str, host: str) -> None:
        dense = make_host(host)
        model = effvit.sparsify(dense, method, **SETTINGS[method]).eval()
        assert_equal_outputs(model, again(model, dense))

    @pytest.mark.parametrize("method", [name for name in SETTINGS if name not in (*WITHOUT_BLOCKS, *BY_EARLIER)])
    def test_reducer_taken_out_by_hand_shows_in_the_settings(self, method: str) -> None:
        dense = make_host("class_token")
        model: Any = effvit.sparsify(dense, method, **SETTINGS[method]).eval()
        first, *others = model.reducers
        model.blocks[first].reducer = None
        assert model.settings["reduce_at"] == others
        assert_equal_outputs(model, again(model, dense))

    @pytest.mark.parametrize("method", WITHOUT_BLOCKS)
    def test_reducer_taken_out_by_hand_is_an_error_without_a_setting_of_blocks(self, method: str) -> None:
        model: Any = effvit.sparsify(make_host("class_token"), method, **SETTINGS[method])
        model.blocks[next(iter(model.reducers))].reducer = None
        with pytest.raises(ValueError, match=f"changed by hand, and no settings of {method} describe them"):
            _ = model.settings

    @pytest.mark.parametrize("method", BY_EARLIER)
    def test_counts_that_depend_on_a_reducer_taken_out_by_hand_are_an_error(self, method: str) -> None:
        """Whether or not the first reduces, the second block keeps int(N r^2) patches, or merges pairs, not windows.

        CubistMerge counts on the grid that the first would have left.
        """
        model: Any = effvit.sparsify(make_host("class_token"), method, **SETTINGS[method])
        model.blocks[next(iter(model.reducers))].reducer = None
        with pytest.raises(ValueError, match=f"changed by hand, and no settings of {method} describe them"):
            _ = model.settings

    def test_change_by_hand_that_no_setting_describes_is_an_error(self) -> None:
        model: Any = make_model("tome", "class_token")
        model.blocks[1].reducer = None
        model.blocks[2].reducer.prop_attn = False
        with pytest.raises(ValueError, match="changed by hand, and no settings of tome describe them"):
            _ = model.settings

    def test_calibrated_thresholds_are_settings(self) -> None:
        model = calibrated()
        dense = host_of("deit_tiny_patch16_224")
        assert model.settings["thresholds"] == [float(block.reducer.threshold) for block in model.blocks]
        x = pictures(model)
        assert torch.equal(again(model, dense)(x), model(x))


def assert_equal_outputs(model: nn.Module, other: nn.Module) -> None:
    x = images_of(model)
    assert torch.equal(model(x), other(x))


class Scaled(Reducer):
    """A method of another package with a weight of its own."""

    name, summary, keeps_every_patch = "scaled", "patches times a trained factor", True

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    @classmethod
    def plan(cls, depth: int, *, reduce_at: Any = (1,)) -> dict[int, Reducer]:
        return {block: cls() for block in reduce_at}

    def count(self, num_tokens: int, num_patches: int) -> int:
        return num_tokens

    def reduce(self, x: Tensor, tokens: Any, state: Any) -> tuple[Tensor, Any]:
        return x * self.factor, tokens


class TestReducedAgain:
    def test_parameters_of_a_reducer_stay_and_are_shared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(METHODS, "scaled", Scaled)
        model: Any = effvit.sparsify(make_host("class_token"), "scaled").eval()
        nn.init.constant_(model.blocks[1].reducer.factor, 3)
        other: Any = effvit.sparsify(model, "scaled").eval()
        assert other.blocks[1].reducer.factor is model.blocks[1].reducer.factor
        assert_equal_outputs(model, other)

    def test_parameters_without_a_place_are_named_in_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(METHODS, "scaled", Scaled)
        model = effvit.sparsify(make_host("class_token"), "scaled")
        with pytest.warns(UserWarning, match=r"scaled had learnt blocks\.1\.reducer\.factor, which the new"):
            effvit.sparsify(model, "scaled", reduce_at=(2,))

    def test_thresholds_stay_for_the_same_r_and_are_missed_for_another(self) -> None:
        model = calibrated()
        x = pictures(model)
        assert torch.equal(effvit.sparsify(model, "dymu", r_total=12).eval()(x), model(x))
        with pytest.warns(UserWarning, match="dymu had learnt blocks.0.reducer.threshold"):
            other = effvit.sparsify(model, "dymu", r_total=24).eval()
        with pytest.raises(ValueError, match="has no threshold yet"):
            other(x)

    def test_calibrating_the_new_model_leaves_the_given_one_alone(self) -> None:
        model = calibrated()
        before = model.settings
        effvit.calibrate(effvit.sparsify(model, "dymu", r_total=12), [pictures(model).flip(0) * 2])
        assert model.settings == before

    def test_trained_recovery_stays_unless_the_method_changes(self) -> None:
        model: Any = make_model("evit", "class_token", recover="attention")
        again_evit: Any = effvit.sparsify(model, "evit")
        assert again_evit.recover == "attention"
        assert again_evit.recovery is not None
        with pytest.warns(UserWarning, match="evit had learnt recovery"):
            effvit.sparsify(model, "tome")


class TestSharing:
    CASTS: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "half": lambda model: model.half(),
        "bfloat16": lambda model: model.bfloat16(),
        "double": lambda model: model.double(),
        "to": lambda model: model.to(torch.float64),
        "there and back": lambda model: model.to(torch.float64).float(),
    }

    @pytest.mark.parametrize("cast", CASTS)
    @pytest.mark.parametrize(
        ("method", "host"), [("tome", h) for h in ("eva02", "dinov3", "rope_mixed", "lvvit", "class_token")]
    )
    def test_cast_model_takes_the_one_it_shares_with_along_whole(self, cast: str, method: str, host: str) -> None:
        dense, alone = make_host(host), make_host(host)
        model = effvit.sparsify(dense, method, **SETTINGS[method])
        self.CASTS[cast](model)
        self.CASTS[cast](alone)
        for (name, own), wanted in zip(dense.state_dict().items(), alone.state_dict().values(), strict=True):
            assert own.dtype == wanted.dtype, name
        assert [b.dtype for b in dense.buffers()] == [b.dtype for b in alone.buffers()]
        x = images_of(model).to(next(dense.parameters()).dtype)
        assert torch.equal(dense(x), alone(x))

    def test_tiny_vit_is_taken_along_whole_too(self) -> None:
        dense = host_of("tiny_vit_5m_224")
        effvit.sparsify(dense, "tome").double()
        assert {b.dtype for b in dense.buffers() if b.is_floating_point()} == {torch.float64}
        assert dense(torch.zeros(1, 3, 224, 224, dtype=torch.float64)).dtype == torch.float64

    @pytest.mark.parametrize("host", ["eva02", "dinov3", "lvvit"])
    def test_cast_of_the_dense_model_is_noticed_by_the_reduced_one(self, host: str) -> None:
        dense = make_host(host)
        model = effvit.sparsify(dense, "tome", r=2).eval()
        dense.bfloat16()
        x = images_of(model).bfloat16()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="a model that shares them was moved or cast"):
                model(x)
            assert model.bfloat16()(x).dtype == torch.bfloat16

    @pytest.mark.parametrize(("method", "host"), [*[("evit", h) for h in ("class_token", "dinov3")], ("tome", "lvvit")])
    def test_model_of_its_own_shares_nothing(self, method: str, host: str) -> None:
        dense = make_host(host)
        model = effvit.sparsify(dense, method, share=False, **SETTINGS[method]).eval()
        shared = effvit.sparsify(dense, method, **SETTINGS[method]).eval()
        assert_equal_outputs(model, shared)
        places = {t.data_ptr() for t in (*dense.parameters(), *dense.buffers()) if t.numel()}
        assert not places & {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}

    def test_tiny_vit_of_its_own_shares_nothing(self) -> None:
        dense = host_of("tiny_vit_5m_224")
        model = effvit.sparsify(dense, "tome", share=False)
        places = {t.data_ptr() for t in (*dense.parameters(), *dense.buffers())}
        assert not places & {t.data_ptr() for t in (*model.parameters(), *model.buffers())}

    def test_state_dict_that_is_assigned_leaves_the_dense_model_whole(self) -> None:
        dense = make_host("dinov3")
        x = images_of(dense)
        wanted = dense(x)
        model = effvit.sparsify(dense, "tome", r=2)
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
        assert torch.equal(dense(x), wanted)

    def test_share_is_true_or_false(self) -> None:
        with pytest.raises(TypeError, match="share must be True or False, got 1"):
            effvit.sparsify(make_host("class_token"), "tome", share=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [*SMALL, *(f"{method} on {host}" for method, host in sorted(covering(PAIRS)))])
def test_every_layer_may_be_wrapped_that_classifies(case: str) -> None:
    model: Any = make_architecture(case) if case in SMALL else make_model(*case.split(" on "))
    x = torch.randn(2, 3, *SIZES[case][0]) if case in SMALL else images_of(model)
    plain = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear) and ("head" in name or child.startswith("fc")) and "blocks" not in name:
            setattr(model.get_submodule(parent), child, Wrapped(module))
    for own, wanted in zip(outputs(model, x), outputs(plain, x), strict=True):
        assert torch.equal(own, wanted)
    assert [y.shape for y in outputs(model.train(), x)] == [y.shape for y in outputs(plain.train(), x)]


def count() -> Counter[str]:
    """How many combinations of KINDS and ways there are, and what became of them."""
    found: Counter[str] = Counter()
    for make, _ in KINDS.values():
        model = make()
        for way in (*WHOLE, *BY_KEYWORDS):
            with TemporaryDirectory() as folder:
                try:
                    assert_same(model, way(model, Path(folder)), pictures(model))
                    found["right"] += 1
                except AssertionError:
                    found["wrong"] += 1
                except (ValueError, TypeError, AttributeError, RuntimeError):
                    found["refused"] += 1
    return found


if __name__ == "__main__":
    print(dict(count()))
