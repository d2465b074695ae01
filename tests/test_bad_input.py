"""What cannot be computed correctly is refused, in words that name the rule, the value and the remedy."""

from __future__ import annotations

import json
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    DiffAttention,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

import effvit
from effvit.hosts.host import ReducedHost
from effvit.reducers import METHODS, Reducer
from effvit.reducers.gtp import CLASS_SCORES
from effvit.reducers.static_selection import StaticSelection
from effvit.testing import HOSTS, SIZE, make_model

WITH_KEEP_RATE = [name for name, method in METHODS.items() if "keep_rate" in method.defaults()]
WITH_BLOCKS = [name for name, method in METHODS.items() if "reduce_at" in method.defaults()]
WITH_RATES = [name for name in WITH_BLOCKS if name in WITH_KEEP_RATE]  # one for each block
# Those that look at the image.
SCORED = [name for name, method in METHODS.items() if not issubclass(method, StaticSelection)]
IN_ATTENTION = [name for name in SCORED if METHODS[name].before is Reducer.before]
NAN = float("nan")


def vit(**kwargs: Any) -> VisionTransformer:
    """A host of four blocks and 6 x 8 patches."""
    return HOSTS["class_token"](**kwargs).eval()


def eva(**kwargs: Any) -> Eva:
    return Eva(**(SIZE | kwargs)).eval()


def reduced(method: str, **settings: Any) -> ReducedHost:
    return make_model(method, "class_token", **settings)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 48, 64))


class TestNames:
    @pytest.mark.parametrize("ask", [lambda name: effvit.sparsify(vit(), name), effvit.method_settings])
    def test_unknown_method_is_answered_with_the_nearest(self, ask: Callable[[str], Any]) -> None:
        with pytest.raises(ValueError, match=r"unknown method 'evitt'; did you mean evit\?"):
            ask("evitt")

    def test_unknown_method_that_is_near_none_is_answered_with_all(self) -> None:
        with pytest.raises(ValueError, match="unknown method 'x'; known are evit, tome, gtp, ats, zero_tprune"):
            effvit.sparsify(vit(), "x")

    @pytest.mark.parametrize("method", [["tome"], None])
    def test_method_that_is_no_name_is_answered_with_all(self, method: Any) -> None:
        with pytest.raises(TypeError, match=r"method must be a name, one of evit, tome, gtp.*, got "):
            effvit.sparsify(vit(), method)

    def test_class_that_is_no_method_is_named(self) -> None:
        with pytest.raises(TypeError, match=r"a method is a subclass of effvit.Reducer, got <class 'dict'>"):
            effvit.sparsify(vit(), dict)

    @pytest.mark.parametrize("name", ["hf-hub:me/vit", "local-dir:runs/vit"])
    def test_folder_of_timm_is_to_be_read_by_timm(self, name: str) -> None:
        with pytest.raises(TypeError, match=rf"names a folder that timm reads; give timm\.create_model\('{name}'"):
            effvit.sparsify(name, "tome")

    def test_unknown_host_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"unknown model 'deit_smal_patch16_224'; did you mean deit_small_p"):
            effvit.sparsify("deit_smal_patch16_224", "tome")

    def test_setting_of_another_method_is_answered_with_its_owners(self) -> None:
        message = (
            r"tome has no setting 'keep_rate'; it belongs to evit, ats, zero_tprune, dynamicvit, expedite, hot, "
            r"pitome, dpcknn, kmedoids, atc, random, uniform, radial; tome takes r, p"
        )
        with pytest.raises(ValueError, match=message):
            effvit.sparsify(vit(), "tome", keep_rate=0.5)
        with pytest.raises(ValueError, match=message):
            timm.create_model("tome_deit_tiny_patch16_224", keep_rate=0.5)

    def test_misspelt_setting_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"evit has no setting 'keep_rat'; did you mean keep_rate\?"):
            effvit.sparsify(vit(), "evit", keep_rat=0.5)

    def test_unknown_setting_is_answered_with_all_once(self) -> None:
        with pytest.raises(ValueError, match=r"evit has no setting 'x'; evit takes keep_rate, reduce_at"):
            effvit.sparsify(vit(), "evit", x=0.5)

    @pytest.mark.parametrize("name", ["x", "keep_rat"])
    def test_argument_that_neither_the_method_nor_the_host_has_is_named(self, name: str) -> None:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            timm.create_model("evit_deit_tiny_patch16_224", **{name: 0.5})


class TestSettingsOutOfRange:
    @pytest.mark.parametrize(
        ("method", "rate"),
        [(method, rate) for method in WITH_KEEP_RATE for rate in (0, -0.1, 1.3, NAN, float("inf"))]
        + [(method, [0.5, 0.0]) for method in WITH_RATES],
    )
    def test_keep_rate_outside_zero_to_one(self, method: str, rate: Any) -> None:
        blocks = {"reduce_at": (0, 1)} if method in WITH_BLOCKS else {}
        with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\], got (0|-0.1|1.3|nan|inf|0.0)$"):
            reduced(method, keep_rate=rate, **blocks)

    @pytest.mark.parametrize(
        ("method", "rate"),
        [(method, rate) for method in WITH_KEEP_RATE for rate in (True, "0.5")]
        + [(method, [0.5, None]) for method in WITH_RATES],
    )
    def test_keep_rate_that_is_no_number(self, method: str, rate: Any) -> None:
        blocks = {"reduce_at": (0, 1)} if method in WITH_BLOCKS else {}
        with pytest.raises(TypeError, match=r"keep_rate must be a number in \(0, 1\], got (True|'0.5'|None)$"):
            reduced(method, keep_rate=rate, **blocks)

    @pytest.mark.parametrize(
        ("method", "name", "minimum"),
        [
            ("tome", "r", 0),
            ("zero_tprune", "r", 0),
            ("zero_tprune", "num_iters", 1),
            ("gtp", "num_prop", 0),
            ("gtp", "num_neighbours", 1),
            ("evit", "num_tokens", 1),
            ("ats", "num_tokens", 2),
            ("dymu", "r_total", 0),
        ],
    )
    def test_counts_that_are_too_small_or_no_whole_numbers(self, method: str, name: str, minimum: int) -> None:
        with pytest.raises(ValueError, match=f"{name} must be at least {minimum}, got {minimum - 1}"):
            reduced(method, **{name: minimum - 1})
        for value in (1.5, 3.0, True, "3", NAN):
            with pytest.raises(TypeError, match=f"{name} must be a whole number, got {value!r}"):
                reduced(method, **{name: value})

    @pytest.mark.parametrize("inflection", [2.0, -1.5, NAN])
    def test_inflection_of_r_outside_its_range(self, inflection: float) -> None:
        with pytest.raises(ValueError, match=r"the inflection of r must be in \[-1, 1\], got"):
            reduced("tome", r=(2, inflection))

    @pytest.mark.parametrize(
        ("method", "name", "known"),
        [
            ("gtp", "selection", "IMGAttnMean, IMGAttnMax, .*, Random"),
            ("gtp", "propagation", "GraphProp, Mean, None"),
            ("gtp", "graph_type", "Spatial, Semantic, Mixed"),
            ("ats", "grid", "official, midpoint"),
            ("ats", "value_norm", "concat, per_head"),
            ("ats", "ragged", "auto, padded, packed"),
            ("zero_tprune", "preset", "quoted_deit_small, .*"),
            ("zero_tprune", "partition", "sequential_u, sequential_i, alternate"),
            ("zero_tprune", "similarity", "cosine, dot, euclidean, manhattan"),
            ("zero_tprune", "keys", "concatenated, averaged"),
            ("dymu", "preset", "siglip_base_384_72out, clip_large_336_72out"),
            ("dymu", "r_schedule", "constant, linear, reverse_linear"),
            ("dymu", "ragged", "auto, padded, packed"),
            ("algm", "ragged", "auto, padded, packed"),
        ],
    )
    def test_choices_that_do_not_exist(self, method: str, name: str, known: str) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be one of {known}, got 'x'"):
            reduced(method, **{name: "x"})

    @pytest.mark.parametrize(
        ("method", "name"),
        [
            ("evit", "fuse_token"),
            ("tome", "prop_attn"),
            ("pitome", "prop_attn"),
            ("ats", "drop_tokens"),
            ("ats", "compat"),
            ("gtp", "token_scale"),
            ("dymu", "compat"),
            ("algm", "compat"),
            ("algm", "prop_attn"),
        ],
    )
    def test_switch_that_is_not_true_or_false(self, method: str, name: str) -> None:
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):  # which counts as True
            reduced(method, **{name: "no"})

    @pytest.mark.parametrize("sparsity", [0, 1.5, NAN])
    def test_sparsity_outside_zero_to_one(self, sparsity: float) -> None:
        with pytest.raises(ValueError, match=r"sparsity must be in \(0, 1\], got"):
            reduced("gtp", sparsity=sparsity)

    def test_sparsity_that_keeps_every_entry_of_the_map(self) -> None:
        with pytest.raises(ValueError, match=r"sparsity 0.9999 keeps every entry of a 49 x 49 .*; use sparsity=1"):
            reduced("gtp", sparsity=0.9999)(images())

    @pytest.mark.parametrize("alpha", ["x", NAN, float("inf")])
    def test_alpha_that_is_no_finite_number(self, alpha: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="alpha must be a finite number, got"):
            reduced("gtp", alpha=alpha)

    @pytest.mark.parametrize("boost", ["x", NAN, 0, -1.0])
    def test_boost_that_is_no_positive_number(self, boost: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="cls_boost must be a positive number, got"):
            reduced("zero_tprune", cls_boost=boost)

    @pytest.mark.parametrize("var_range", [(1,), (1, 0), (NAN, 1), (0.5, "a"), 3, "ab"])
    def test_variance_range_that_is_none(self, var_range: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=r"var_range must be \(smallest, largest\) variance, got"):
            reduced("zero_tprune", var_range=var_range)

    @pytest.mark.parametrize("propagation", ["Mean", "None"])
    def test_token_scale_without_a_graph(self, propagation: str) -> None:
        with pytest.raises(ValueError, match=f"token_scale needs propagation='GraphProp', got '{propagation}'"):
            reduced("gtp", token_scale=True, propagation=propagation)

    def test_rate_and_number_of_sampling_points_together(self) -> None:
        with pytest.raises(ValueError, match="keep_rate and num_tokens"):
            reduced("ats", keep_rate=0.5, num_tokens=4)

    @pytest.mark.parametrize("method", ["ats", "dymu", "algm"])
    def test_packed_batch_with_the_official_batch_dependence(self, method: str) -> None:
        with pytest.raises(ValueError, match=r"compat=True reproduces the official padded batch; it needs ragged='pa"):
            reduced(method, ragged="packed", compat=True)

    def test_unknown_fill(self) -> None:
        message = "recover must be one of last, nearest, zero, reconstruct, attention, got 'x'"
        with pytest.raises(ValueError, match=message):
            reduced("evit", recover="x")
        with pytest.raises(ValueError, match=message):
            timm.create_model("evit_deit_tiny_patch16_224", recover="x")
        with pytest.raises(ValueError, match=message):
            effvit.to_map(*reduced("evit").forward_tokens(images()), fill="x")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"step": -1}, "step must be at least 0, got -1"),
            ({"step": 1.5}, "step must be a whole number, got 1.5"),
            ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
            ({"keep_rate": 1.5}, r"keep_rate must be in \(0, 1\], got 1.5"),
            ({"start_epoch": -1}, "start_epoch must be at least 0, got -1"),
            ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ],
    )
    def test_cosine_schedule_out_of_range(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            effvit.cosine_keep_rate(**({"step": 0, "steps_per_epoch": 10, "keep_rate": 0.5} | arguments))


class TestModels:
    """A name, a path or weights in place of a model."""

    @pytest.mark.parametrize("given", ["deit_tiny_patch16_224", {}, None, 3])
    def test_what_is_no_model_is_named(self, given: Any, tmp_path: Path) -> None:
        remedy = "; timm.create_model makes one of a name" if isinstance(given, str) else ""
        message = f"expected a model, an nn.Module, got {type(given).__name__}{remedy}"
        for call in (
            lambda: effvit.count_flops(given, (3, 48, 64)),
            lambda: effvit.load_checkpoint(given, tmp_path / "some.pth"),
            lambda: effvit.compile(given),
        ):
            with pytest.raises(TypeError, match=f"^{message}$"):
                call()

    def test_model_in_place_of_its_class(self) -> None:
        with pytest.raises(TypeError, match="takes a class of models, got VisionTransformer; give the class itself"):
            effvit.register_host(vit())  # type: ignore[type-var]

    @pytest.mark.parametrize("size", ["x", (48, 64), 48, (3, 48.0, 64)])
    def test_size_that_is_none(self, size: Any) -> None:
        with pytest.raises(TypeError, match=r"input_size must be \(channels, H, W\), got"):
            effvit.count_flops(vit(), size)

    def test_images_that_are_none(self) -> None:
        with pytest.raises(TypeError, match=r"images must be a tensor \(B, channels, H, W\), got list"):
            effvit.count_flops(vit(), (3, 48, 64), images=[1])
        with pytest.raises(ValueError, match=r"expected at least one image of 3 x 48 x 64, got a tensor of shape \(\)"):
            effvit.count_flops(vit(), (3, 48, 64), images=torch.tensor(3.0))

    def test_batches_without_labels(self) -> None:
        for batches in ([images()], images(2, 2, 3, 48, 64)):
            with pytest.raises(TypeError, match=r"batches must give pairs \(images, labels\), got Tensor"):
                effvit.search_rates(vit(), batches, 0.7, steps=1)  # type: ignore[arg-type]


class TestAnySetting:
    """Whatever is given for whatever setting of whatever method."""

    VALUES = (NAN, float("inf"), -1, 0, 1e9, 2.5, "x", b"a", [], [1], [0.5, "a"], [NAN] * 4, {}, True, torch.tensor(3))

    @pytest.mark.parametrize(
        ("method", "setting"), [(method, name) for method, kind in METHODS.items() for name in kind.defaults()]
    )
    def test_refusal_names_a_setting_or_the_method(self, method: str, setting: str) -> None:
        refusals: list[str] = []
        for value in self.VALUES:
            try:
                reduced(method, **{setting: value})
            except (TypeError, ValueError) as error:
                refusals.append(str(error))
        names = "|".join([method, *METHODS[method].defaults()])
        assert [text for text in refusals if not re.search(rf"\b({names})\b", text)] == []


class TestBlocksAndLengths:
    @pytest.mark.parametrize("method", WITH_BLOCKS)
    @pytest.mark.parametrize(
        ("blocks", "message"),
        [
            ((4,), "reduce_at names block 4, but the model has blocks 0 to 3"),
            ((-1,), "reduce_at names block -1, but the model has blocks 0 to 3"),
            ((1, 1), r"reduce_at names block 1 twice: \[1, 1\]"),
            ((2, 1), r"reduce_at must be in ascending order, got \[2, 1\]"),
        ],
    )
    def test_blocks_outside_the_depth_or_twice_or_unordered(
        self, method: str, blocks: tuple[int, ...], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            reduced(method, reduce_at=blocks)

    @pytest.mark.parametrize("method", WITH_BLOCKS)
    @pytest.mark.parametrize("blocks", [1, 2.5, NAN, {1}, (1.0,), "1", "", b"", (True,), [[1]]])
    def test_blocks_that_are_no_block_numbers(self, method: str, blocks: Any) -> None:
        message = f"reduce_at must be a sequence of 0-based block numbers, got {blocks!r}"
        with pytest.raises(TypeError, match=re.escape(message)):
            reduced(method, reduce_at=blocks)

    @pytest.mark.parametrize(
        ("method", "name"),
        [
            ("evit", "keep_rate"),
            ("evit", "num_tokens"),
            ("pitome", "keep_rate"),
            ("ats", "keep_rate"),
            ("ats", "num_tokens"),
            ("zero_tprune", "keep_rate"),
            ("zero_tprune", "r"),
            ("zero_tprune", "num_iters"),
        ],
    )
    def test_sequence_of_another_length_than_the_blocks(self, method: str, name: str) -> None:
        value = 0.5 if name == "keep_rate" else 2
        message = rf"{name} has 2 values for 1 block \[1\]; give one value for all, or one for each block"
        with pytest.raises(ValueError, match=message):
            reduced(method, **{"reduce_at": (1,), name: [value, value]})

    def test_sequences_over_all_blocks(self) -> None:
        with pytest.raises(ValueError, match=r"thresholds has 2 values for 4 blocks \[0, 1, 2, 3\]; give one value"):
            reduced("dymu", thresholds=[0.5, 0.5])
        with pytest.raises(ValueError, match=r"r_total has 2 values for 4 blocks \[0, 1, 2, 3\]; give one value"):
            reduced("dymu", r_total=[1, 2])
        with pytest.raises(ValueError, match=r"num_prop has 2 values for 4 blocks \[0, 1, 2, 3\]; give one value"):
            reduced("gtp", num_prop=[1, 2])
        with pytest.raises(ValueError, match="r has 5 values, but the model has 4 blocks"):
            reduced("tome", r=[1, 1, 1, 1, 1])


class TestThresholds:
    @pytest.mark.parametrize("value", [1.5, -1.01])
    def test_threshold_that_is_no_cosine(self, value: float) -> None:
        message = re.escape(f"thresholds must be cosine similarities in [-1, 1], got {value}")
        with pytest.raises(ValueError, match=message):
            reduced("dymu", thresholds=[0.5, value, 0.5, 0.5])

    @pytest.mark.parametrize("value", [NAN, "0.5", None, True])
    def test_threshold_that_is_no_number(self, value: Any) -> None:
        with pytest.raises(ValueError, match=f"thresholds must be a finite number, got {value!r}"):
            reduced("dymu", thresholds=[0.5, value, 0.5, 0.5])

    @pytest.mark.parametrize("value", [0.5, "abc"])
    def test_thresholds_that_are_no_sequence(self, value: Any) -> None:
        with pytest.raises(
            TypeError, match=f"thresholds must be a sequence with one number for each .*, got {value!r}"
        ):
            reduced("dymu", thresholds=value)

    @pytest.mark.parametrize("ratio", [0, -1.0, NAN, "2"])
    def test_limit_of_an_image_that_is_no_positive_number(self, ratio: Any) -> None:
        with pytest.raises(ValueError, match=f"max_r_per_instance_ratio must be a positive number, got {ratio!r}"):
            reduced("dymu", max_r_per_instance_ratio=ratio)

    def test_limit_of_an_image_that_lets_nothing_merge(self) -> None:
        message = r"max_r_per_instance_ratio 0.2 of r \[2, 2, 2, 1\] lets no block merge a token; raise one of them"
        with pytest.raises(ValueError, match=message):
            reduced("dymu", r_total=7, max_r_per_instance_ratio=0.2)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_model_without_thresholds_does_not_run(self, compiled: bool) -> None:
        model = effvit.sparsify(vit(), "dymu").eval()
        message = r"dymu in block 0 has no threshold yet, .*; call effvit.calibrate\(model, batches\), load a calib"
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=message):
            (torch.compile(model, fullgraph=True, backend="eager") if compiled else model)(images())

    def test_calibration_of_what_has_no_thresholds(self) -> None:
        with pytest.raises(TypeError, match=r"expected a model made by effvit.sparsify\(..., 'dymu'\), got VisionTra"):
            effvit.calibrate(vit(), [images()])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="tome has no thresholds to calibrate; methods that have are dymu"):
            effvit.calibrate(reduced("tome"), [images()])
        with pytest.raises(ValueError, match=r"dymu has r 0 in every block \(r_total=0\): nothing to calibrate"):
            effvit.calibrate(effvit.sparsify(vit(), "dymu", r_total=0), [images()])

    def test_calibration_of_given_thresholds(self) -> None:
        with pytest.raises(ValueError, match=r"the settings give thresholds, .*; make the model with thresholds=None"):
            effvit.calibrate(reduced("dymu"), [images()])

    def test_calibration_on_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"batches holds no batch of images, .*; give at least one"):
            effvit.calibrate(effvit.sparsify(vit(), "dymu"), [])

    def test_calibration_on_labelled_images(self) -> None:
        message = r"as tensors, got list; for a loader of \(images, labels\) give \(images for images, _ in loader\)"
        with pytest.raises(TypeError, match=message):
            effvit.calibrate(effvit.sparsify(vit(), "dymu"), [[images(), torch.zeros(2)]])  # type: ignore[list-item]


class TestSchedulesThatLeaveNoToken:
    def test_schedule_is_refused_when_the_model_is_made(self) -> None:
        with pytest.raises(ValueError, match=r"gtp would leave 0 of 16 patch tokens in block 2 .* 6 x 8; reduce less"):
            reduced("gtp", num_prop=16)
        with pytest.raises(ValueError, match=r"zero_tprune would leave 0 of 48 patch tokens in block 0"):
            reduced("zero_tprune", keep_rate=0.01, r=0)

    def test_schedule_is_refused_for_a_smaller_input_size_and_never_computed(self) -> None:
        model = reduced("gtp", num_prop=5)
        with pytest.raises(ValueError, match=r"gtp would leave -1 of 4 patch tokens in block 1 .* 3 x 3; reduce less"):
            model.set_input_size((24, 24))
        with pytest.raises(ValueError, match=r"gtp would leave -1 of 4|expected images of 48 x 64 pixels, got 24 x 24"):
            model(images(1, 3, 24, 24))

    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            ("gtp", {"num_prop": 5}),
            ("gtp", {"num_prop": 50, "propagation": "Mean"}),
            ("gtp", {"num_prop": 5, "propagation": "None", "sparsity": 0.999}),
            ("gtp", {"num_prop": 3, "graph_type": "Semantic", "num_neighbours": 30}),
            ("zero_tprune", {"keep_rate": 0.02, "r": 0}),
            ("expedite", {"num_clusters": (4, 4), "k": 16, "cluster_at": 1}),
            ("hot", {"k": 9, "num_tokens": 2, "reduce_at": (0, 1)}),
            ("dpcknn", {"k": 9, "num_tokens": 2, "reduce_at": (0, 1)}),
            ("dpcknn", {"keep_rate": 0.02}),
            ("kmedoids", {"keep_rate": 0.02}),
            ("atc", {"num_tokens": 2, "reduce_at": (0, 1)}),
            ("kmedoids", {"num_tokens": 5, "equal_weight": True, "reduce_at": (0, 2)}),
            ("tome", {"r": 50}),
        ],
    )
    @pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 3), (1, 9)])
    def test_any_image_of_a_dynamic_model_leaves_a_patch(
        self, method: str, settings: dict[str, Any], grid: tuple[int, int]
    ) -> None:
        """Absolute numbers meet grids they were not chosen for; counts say what the blocks do."""
        model = effvit.sparsify(vit(dynamic_img_size=True), method, **settings)
        x = images(1, 3, 8 * grid[0], 8 * grid[1])
        counts = model.token_counts(grid)
        assert min(counts) >= 1
        assert [features.tokens.num_tokens for features in model.trace_tokens(x)] == counts
        (features,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
        assert features.shape[-2:] == grid
        assert features.isfinite().all()

    def test_gtp_keeps_the_official_count_where_one_is_left(self) -> None:
        """models_v3.py@97a1178 leaves N - num_prop; the floor only takes the place of none."""
        model = effvit.sparsify(vit(dynamic_img_size=True), "gtp", num_prop=7)
        assert model.token_counts((4, 4))[:2] == [9, 2]
        assert model.token_counts((2, 4))[:2] == [1, 1]

    def test_image_without_a_patch(self) -> None:
        dynamic = effvit.sparsify(vit(dynamic_img_size=True), "tome", r=1)
        with pytest.raises(ValueError, match="the patch grid is 0 x 3: images must hold at least one patch"):
            dynamic(images(1, 3, 0, 24))
        with pytest.raises(ValueError, match="the patch grid is 0 x 0: images must hold at least one patch"):
            reduced("tome").set_input_size((4, 4))

    def test_too_many_neighbours_for_the_grid(self) -> None:
        with pytest.raises(
            ValueError, match=r"num_neighbours must be at least 1 and at most 47, got 48 for 48 patches"
        ):
            reduced("gtp", num_neighbours=48)(images())

    def test_without_a_prefix_token_one_neighbour_less_fits_the_grid(self) -> None:
        host = vit(class_token=False, global_pool="avg")
        fits = effvit.sparsify(host, "gtp", num_prop=1, num_neighbours=46)
        assert fits(images()).isfinite().all()
        with pytest.raises(
            ValueError, match=r"num_neighbours must be at least 1 and at most 46, got 47 for 48 patches"
        ):
            effvit.sparsify(host, "gtp", num_prop=1, num_neighbours=47)(images())


class TestSetKeepRate:
    @pytest.mark.parametrize("method", ["tome", "gtp"])
    def test_method_without_keep_rate(self, method: str) -> None:
        with pytest.raises(ValueError, match=f"{method} has no keep rate to set; its settings are (r|num_prop), "):
            reduced(method).set_keep_rate(0.5)

    @pytest.mark.parametrize(
        ("rate", "message"),
        [
            (1.5, r"keep_rate must be in \(0, 1\], got 1.5"),
            (True, r"keep_rate must be a number in \(0, 1\], got True"),
            ([0.5, 0.5], r"keep_rate has 2 values for 1 block \[1\]"),
        ],
    )
    def test_rates_that_do_not_fit(self, rate: Any, message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            reduced("evit", reduce_at=(1,)).set_keep_rate(rate)

    def test_refused_rates_change_nothing(self) -> None:
        model = reduced("evit", reduce_at=(0, 1))
        before = model.token_counts()
        with pytest.raises(ValueError, match="keep_rate must be in"):
            model.set_keep_rate([0.5, 2.0])
        assert model.token_counts() == before

    def test_rate_that_leaves_no_token(self) -> None:
        model = reduced("zero_tprune", r=0)
        with pytest.raises(ValueError, match="zero_tprune would leave 0 of 48 patch tokens in block 0"):
            model.set_keep_rate(0.01)
        assert model(images()).isfinite().all()

    def test_rate_that_leaves_no_token_changes_nothing(self) -> None:
        model = reduced("zero_tprune", r=0)
        before = model.settings
        with pytest.raises(ValueError, match="zero_tprune would leave 0 of 1 patch tokens in block 2"):
            model.set_keep_rate(0.02)
        assert model.settings == before

    @pytest.mark.parametrize(
        ("method", "settings"),
        [("evit", {"keep_rate": 1.0}), ("evit", {"num_tokens": 4}), ("ats", {"num_tokens": 4})],
    )
    def test_rate_that_would_have_no_effect(self, method: str, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"{method}.*(no block|num_tokens)"):
            reduced(method, **settings).set_keep_rate(0.5)


class TestHosts:
    @pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_class_token])
    @pytest.mark.parametrize(
        ("host", "name", "prefix"),
        [
            (vit(class_token=False, global_pool="avg"), "VisionTransformer", 0),
            (vit(class_token=False, global_pool="avg", reg_tokens=2), "VisionTransformer", 2),
            (eva(class_token=False), "Eva", 0),
        ],
    )
    def test_method_that_needs_a_class_token(self, method: str, host: nn.Module, name: str, prefix: int) -> None:
        message = (
            rf"{method} scores patches by the class token, but this {name} has none "
            rf"\(num_prefix_tokens={prefix}\); use a host with one, or a method .* such as 'tome'"
        )
        with pytest.raises(ValueError, match=message):
            effvit.sparsify(host, method, **METHODS[method].example())

    @pytest.mark.parametrize("selection", CLASS_SCORES)
    def test_selection_that_needs_a_class_token(self, selection: str) -> None:
        host = vit(class_token=False, global_pool="avg")
        with pytest.raises(ValueError, match="gtp scores patches by the class token, but this VisionTransformer has"):
            effvit.sparsify(host, "gtp", num_prop=1, selection=selection)
        with pytest.raises(ValueError, match="gtp scores patches by the class token"):
            timm.create_model("gtp_vit_medium_patch16_gap_256", selection=selection)

    @pytest.mark.parametrize("pool", ["map", "prr"])
    @pytest.mark.parametrize("ragged", ["padded", "packed"])
    def test_variable_counts_under_attention_pooling(self, pool: str, ragged: str) -> None:
        host = vit(global_pool=pool)
        with pytest.raises(ValueError, match=rf"attention pooling \(global_pool='{pool}'\) cannot tell from padding"):
            effvit.sparsify(host, "ats", ragged=ragged)
        host.reset_classifier(5, "token")  # the remedy that the message gives
        assert effvit.sparsify(host, "ats", ragged=ragged)(images()).isfinite().all()

    @pytest.mark.parametrize("block", [ParallelScalingBlock, ParallelThingsBlock, ResPostBlock])
    def test_unknown_block_class_of_a_vision_transformer(self, block: type[nn.Module]) -> None:
        message = rf"blocks\.0 is a {block.__name__}, which token reduction does not know; supported are Block"
        with pytest.raises(TypeError, match=message):
            effvit.sparsify(vit(block_fn=block), "tome")

    def test_unknown_block_class_of_an_eva(self) -> None:
        with pytest.raises(TypeError, match=r"blocks\.0 is an? EvaBlockPostNorm, which .*: choose a host built from"):
            effvit.sparsify(eva(use_post_norm=True), "tome")

    def test_unknown_attention_class(self) -> None:
        message = r"blocks\.0\.attn is a DiffAttention, which .*; supported are Attention, AttentionRope"
        with pytest.raises(TypeError, match=message):
            effvit.sparsify(vit(attn_layer=DiffAttention), "tome")

    @pytest.mark.parametrize(
        "name",
        ["resnet10t", "convnext_atto"],
    )
    def test_model_that_is_no_plain_vision_transformer(self, name: str) -> None:
        with torch.device("meta"):
            host = timm.create_model(name)
            message = rf"cannot reduce the tokens of a timm\..*{type(host).__name__}; supported are .*VisionTransformer"
            with pytest.raises(TypeError, match=message):
                effvit.sparsify(host, "tome")

    def test_plain_vision_transformer_of_an_odd_name_is_reduced(self) -> None:
        with torch.device("meta"):  # beside the names above it looks like one of another class, and is none
            host = timm.create_model("vit_base_patch32_plus_256")
            assert effvit.sparsify(host, "tome").method == "tome"

    def test_subclass_whose_forward_may_differ(self) -> None:
        class Custom(VisionTransformer):
            pass

        message = r"Custom is a subclass of timm.*VisionTransformer and may compute something else, .*register_host"
        with pytest.raises(TypeError, match=message):
            effvit.sparsify(Custom(**SIZE), "tome")


class TestImages:
    @pytest.mark.parametrize("shape", [(3, 48, 64), (1, 1, 3, 48, 64), (1, 1, 48, 64), (1, 4, 48, 64), (1, 48, 64, 3)])
    def test_wrong_number_of_dimensions_or_channels(self, shape: tuple[int, ...]) -> None:
        message = rf"expected images \(B, 3, H, W\), got a tensor of shape {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            reduced("tome")(images(*shape))

    def test_channels_of_the_model_are_named(self) -> None:
        model = effvit.sparsify(vit(in_chans=4), "tome", r=2)
        with pytest.raises(ValueError, match=r"expected images \(B, 4, H, W\)"):
            model(images())

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("size", [(64, 48), (48, 72), (49, 64)])
    def test_wrong_size(self, method: str, size: tuple[int, int]) -> None:
        model = reduced(method)
        message = (
            rf"expected images of 48 x 64 pixels, got {size[0]} x {size[1]}; "
            rf"call model\.set_input_size\(\({size[0]}, {size[1]}\)\), create .* dynamic_img_size=True"
        )
        for run in (
            model,
            model.forward_features,
            model.forward_tokens,
            model.trace_tokens,
            model.forward_intermediates,
        ):
            with pytest.raises(ValueError, match=message):
                run(images(1, 3, *size))

    def test_size_that_is_no_multiple_of_the_patch(self) -> None:
        model = effvit.sparsify(vit(dynamic_img_size=True), "tome", r=2)
        message = "20 x 24 is not a multiple of the patch size 8 x 8; resize .* with dynamic_img_pad=True"
        with pytest.raises(ValueError, match=message):
            model(images(1, 3, 20, 24))
        padding = effvit.sparsify(vit(dynamic_img_size=True, dynamic_img_pad=True), "tome", r=2)
        assert padding(images(1, 3, 20, 24)).isfinite().all()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float16])
    def test_other_dtype_than_the_model(self, method: str, dtype: torch.dtype) -> None:
        message = f"expected images of dtype torch.float32, the model's, got {dtype}; convert the images"
        with pytest.raises(TypeError, match=message):
            reduced(method)(torch.zeros(1, 3, 48, 64, dtype=dtype))

    @pytest.mark.parametrize("method", METHODS)
    def test_uint8_is_refused_under_autocast_too(self, method: str) -> None:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(TypeError, match=r"expected images of dtype torch\.float32, the model's, got torch\.uint8"),
        ):
            reduced(method)(torch.zeros(1, 3, 48, 64, dtype=torch.uint8))

    def test_half_precision_is_taken_under_autocast(self) -> None:
        """As timm's models take it."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert reduced("tome")(images().bfloat16()).isfinite().all()

    @pytest.mark.parametrize("size", [(20, 24), (24, 20)])
    def test_each_side_is_a_multiple_of_the_patch(self, size: tuple[int, int]) -> None:
        model = effvit.sparsify(vit(dynamic_img_size=True), "tome", r=2)
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} is not a multiple of the patch size 8 x 8"):
            model(images(1, 3, *size))

    def test_array_in_place_of_a_tensor(self) -> None:
        with pytest.raises(TypeError, match=r"expected images \(B, 3, H, W\) as a tensor, got ndarray"):
            reduced("tome")(images().numpy())

    def test_empty_batch(self) -> None:
        with pytest.raises(ValueError, match=r"the batch holds no image: shape \(0, 3, 48, 64\); leave empty batches"):
            reduced("tome")(torch.zeros(0, 3, 48, 64))


@pytest.mark.parametrize("method", SCORED)
def test_nan_in_an_image_names_the_image_and_the_input(method: str) -> None:
    x = images(3, 3, 48, 64)
    x[1, 0, 5, 5] = NAN
    message = rf"{method} in block \d: .* are NaN for image 1 of the batch; the tokens that entered .* hold NaN"
    with pytest.raises(ValueError, match=message):
        reduced(method)(x)


@pytest.mark.parametrize("method", IN_ATTENTION)
@pytest.mark.parametrize("attention", [None, "eager"])
def test_nan_in_the_keys_of_a_block_names_the_block_and_its_weights(method: str, attention: str | None) -> None:
    model = reduced(method)
    first = min(model.reducers)
    block = model.blocks[first]
    block.attn.fused_attn = attention is None
    with torch.no_grad():
        block.attn.qkv.weight[SIZE["embed_dim"]] = NAN  # the first row of the keys
    message = rf"{method} in block {first}: .* are NaN for image 0 .* are finite: its own weights hold NaN"
    with pytest.raises(ValueError, match=message):
        model(images())


@pytest.mark.parametrize("selection", ["CLSAttnMean", "CosSimMax", "IMGAttnMean"])
def test_nan_message_names_the_selection(selection: str) -> None:
    model = reduced("gtp", selection=selection)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[0] = NAN
    with pytest.raises(ValueError, match=f"gtp in block 1: {selection} scores are NaN .* its own weights hold NaN"):
        model(images())


class TestForwardArguments:
    @pytest.mark.parametrize("pool", ["token", "map"])
    @pytest.mark.parametrize("argument", [{"attn_mask": torch.ones(1, 1, 49, 49)}, {"is_causal": True}])
    def test_masks_over_the_full_sequence(self, pool: str, argument: dict[str, Any]) -> None:
        model = effvit.sparsify(vit(global_pool=pool), "tome", r=2)
        message = "reduced by tome takes no attn_mask or is_causal: .*; use the dense model for masked input"
        for run in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match=message):
                run(images(), **argument)

    def test_unknown_output_format(self) -> None:
        with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
            reduced("tome").forward_intermediates(images(), output_fmt="NHWC")

    def test_fill_last_without_memory(self) -> None:
        features = reduced("evit").forward_tokens(images())
        message = r"recover 'last' needs .* holds no memory; get it from forward_tokens\(x, memory=True\) or"
        with pytest.raises(ValueError, match=message):
            effvit.to_map(*features)
        assert effvit.to_map(*reduced("evit").forward_tokens(images(), memory=True)).shape == (2, 32, 6, 8)

    def test_drop_path_in_a_packed_batch(self) -> None:
        host = vit(drop_path_rate=0.5)
        packed = effvit.sparsify(host, "ats", reduce_at=(0, 1), ragged="packed")
        assert packed.eval()(images()).isfinite().all()
        message = "a packed batch is one row, so drop_path cannot .*; train with ragged='padded'"
        with pytest.raises(ValueError, match=message):
            packed.train()(images())


class TestCheckpoints:
    def test_missing_file(self, tmp_path: Path) -> None:
        path = tmp_path / "none.pth"
        with pytest.raises(FileNotFoundError, match=re.escape(f"no checkpoint at {path}")):
            effvit.load_checkpoint(reduced("evit"), path)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (
                {"embed_dim": 48},
                r"cls_token has shape \(1, 1, 48\), the model's \(1, 1, 32\); .* and 51 more",
            ),
            ({"num_classes": 9}, r"head.weight has shape \(9, 32\), the model's \(7, 32\)"),
            ({"depth": 5}, r"blocks\.4\.norm1\.weight is not a parameter of the model; .* and \d+ more"),
            ({"depth": 3}, r"blocks\.3\.norm1\.weight is missing"),
        ],
    )
    def test_checkpoint_of_another_shape(self, other: dict[str, int], message: str, tmp_path: Path) -> None:
        path = tmp_path / "other.pth"
        torch.save(vit(**other).state_dict(), path)
        model = reduced("evit")
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(ValueError, match=f"is a checkpoint of another model than this ReducedViT: {message}"):
            effvit.load_checkpoint(model, path)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    @pytest.mark.parametrize("host", [vit, eva])
    def test_checkpoint_with_foreign_names(self, host: Callable[[], nn.Module], tmp_path: Path) -> None:
        path = tmp_path / "resnet.pth"
        torch.save({"state_dict": {"layer1.0.conv1.weight": torch.ones(1)}}, path)
        message = (
            r"none of its 1 entries is named as in timm, .* They begin with layer1; save the model's own state_dict"
        )
        with pytest.raises(ValueError, match=message):
            effvit.load_checkpoint(effvit.sparsify(host(), "tome", r=1), path)

    def test_file_that_holds_no_weights(self, tmp_path: Path) -> None:
        path = tmp_path / "list.pth"
        torch.save([torch.ones(1)], path)
        with pytest.raises(ValueError, match="holds a list, not a dict of weights"):
            effvit.load_checkpoint(reduced("evit"), path)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_truncated_file(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"half{suffix}"
        if suffix == ".pth":
            torch.save(vit().state_dict(), path)
        else:
            save_file(vit().state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"cannot be read as a checkpoint .*; it is truncated"):
            effvit.load_checkpoint(reduced("evit"), path)

    @pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
    def test_code_in_a_file_is_not_run(self, write: Callable[[Any, Path], Any], tmp_path: Path) -> None:
        ran = tmp_path / "ran"
        path = tmp_path / "hostile.pth"
        write({"model": dict(vit().state_dict()), "extra": Touch(ran)}, path)
        with pytest.raises(ValueError, match=r"cannot be read as a checkpoint .* holds code besides weights"):
            effvit.load_checkpoint(reduced("evit"), path)
        assert not ran.exists()

    def test_folder_in_place_of_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is a folder, not a checkpoint; name the file in it"):
            effvit.load_checkpoint(reduced("evit"), tmp_path)

    def test_entries_without_a_name(self, tmp_path: Path) -> None:
        path = tmp_path / "numbered.pth"
        torch.save({0: torch.ones(1)}, path)
        with pytest.raises(ValueError, match="names its weights by strings, but this one has an entry 0"):
            effvit.load_checkpoint(reduced("evit"), path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("empty.pth", b""),
            ("empty.safetensors", b""),
            ("text.pth", b"<html>not found</html>"),
            ("stop.pth", b"\x80\x02."),  # a pickle of nothing: IndexError inside torch
            ("long_header.safetensors", struct.pack("<Q", 2**50) + b"{}"),
            ("no_json.safetensors", struct.pack("<Q", 2) + b"[["),
        ],
    )
    def test_file_of_another_format(self, name: str, content: bytes, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as a checkpoint .*; it is truncated, of another format"):
            effvit.load_checkpoint(reduced("evit"), tmp_path / name)

    def test_text_in_place_of_weights(self, tmp_path: Path) -> None:
        """Read as a pickle, its first letter asks for an entry that was never stored."""
        (tmp_path / "notes.txt").write_text("hello weights")
        message = r"checkpoint \(its entries refer to others that are not there\); it is truncated, of another format"
        with pytest.raises(ValueError, match=message):
            effvit.load_checkpoint(reduced("evit"), tmp_path / "notes.txt")

    @pytest.mark.parametrize(("shape", "end"), [([4], 16), ([1 << 40], 1 << 42), ([2], 4), ([-1], 4)])
    def test_header_that_promises_other_weights_than_the_file_holds(
        self, shape: list[int], end: int, tmp_path: Path
    ) -> None:
        header = json.dumps({"head.bias": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        path = tmp_path / "lying.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            effvit.load_checkpoint(reduced("evit"), path)

    def test_archive_that_grows_when_it_is_unpacked(self, tmp_path: Path) -> None:
        whole, path = tmp_path / "whole.pth", tmp_path / "bomb.pth"
        torch.save(vit().state_dict(), whole)
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in source.namelist():
                bomb.writestr(entry, source.read(entry))
            bomb.writestr("whole/data/bomb", bytes(1 << 24))
        with pytest.raises(ValueError, match=r"cannot be read as a checkpoint \(\d+ bytes would unpack to \d+\)"):
            effvit.load_checkpoint(reduced("evit"), path)

    @pytest.mark.parametrize("weight", [torch.ones(1).expand(1 << 40), torch.empty(5, device="meta")])
    def test_weight_that_is_larger_than_its_memory(self, weight: torch.Tensor, tmp_path: Path) -> None:
        path = tmp_path / "expanded.pth"
        torch.save({"model": {"head.bias": weight}}, path)
        with pytest.raises(ValueError, match=r"head\.bias of shape \(\d+,\) is not in the file as a whole"):
            effvit.load_checkpoint(reduced("evit"), path)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_damaged_file_gives_no_other_error(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"damaged{suffix}"
        model = vit(depth=1)
        (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
        whole, draw, refused = path.read_bytes(), random.Random(0), 0
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(8):
                damaged[draw.randrange(3000)] = draw.randrange(256)
            path.write_bytes(damaged)
            try:
                effvit.load_checkpoint(model, path)
            except ValueError:
                refused += 1
        assert refused > 50


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return (Path.touch, (self.path,))
