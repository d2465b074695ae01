"""Pictures of tokens: colours in closed form on tiny images, and the panels of real methods."""

from __future__ import annotations

import json
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
import timm
import torch
from architectures import make_architecture
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import effvit
from effvit.data.preparation import data_config, load_images
from effvit.measure.records import as_object
from effvit.reducers import METHODS
from effvit.show.token_stages import Stage
from effvit.show.visualize import (
    BORDER,
    DROPPED,
    FUSED,
    TINTS,
    draw_tokens,
    model_text,
    paint,
    seen_by,
    settings_text,
    spread,
    stack,
    token_figure,
    token_record,
    token_stages,
)
from effvit.testing import make_model
from effvit.tokens import Moved, TokenMap


def tiny_vit(img_size: int | tuple[int, int] = 64) -> VisionTransformer:
    model = VisionTransformer(img_size=img_size, patch_size=16, embed_dim=48, depth=4, num_heads=3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)  # sharp attention, so that the methods choose something
    return model


def photograph(width: int = 96, height: int = 80) -> Image.Image:
    """A colour gradient with seeded noise."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    pixels = ramp * (200, 150, 90) + rng.uniform(0, 40, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def full_map(grid: tuple[int, int]) -> TokenMap:
    return TokenMap.full(torch.zeros(1, 1 + grid[0] * grid[1], 4), grid, 1, 1)


class TestDrawTokens:
    def test_full_grid_is_the_image_itself(self):
        image = photograph()
        assert np.array_equal(draw_tokens(image, full_map((5, 6))), image)

    def test_kept_patches_are_untouched_and_dropped_ones_tinted(self):
        image = photograph(64, 32)  # 2 x 4 patches of 16 pixels
        tokens = full_map((2, 4)).keep(torch.tensor([[0, 2, 3, 5, 7]]), 5)
        before, drawn = np.asarray(image), np.asarray(draw_tokens(image, tokens))
        tint, share = TINTS[DROPPED]
        for patch in range(8):
            row, column = divmod(patch, 4)
            place = (slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
            if patch in (0, 2, 3, 5, 7):
                assert np.array_equal(drawn[place], before[place])
            else:
                grey = before[place].mean(-1, keepdims=True)
                expected = (1 - share) * grey + share * np.array(tint)
                assert np.abs(drawn[place] - expected).max() <= 0.5 + 1e-9

    def test_merged_patches_have_the_mean_colour_of_their_group(self):
        image = photograph(64, 32)
        # Patches 0, 1 and 7 become one token; 2 to 6 stay alone.
        target = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 0]])
        tokens = full_map((2, 4)).relabel(Moved(target, torch.tensor([[0, 2, 3, 4, 5, 6]])), 6)
        before, drawn = np.asarray(image, dtype=float), np.asarray(draw_tokens(image, tokens))
        group = np.concatenate([before[:16, :32].reshape(-1, 3), before[16:, 48:].reshape(-1, 3)])
        assert np.abs(drawn[8, 8] - group.mean(0)).max() <= 0.5 + 1e-9
        assert np.array_equal(drawn[8, 8], drawn[24, 56])
        assert np.array_equal(drawn[:16, 32:48], before[:16, 32:48])  # alone beside the group

    def test_border_runs_inside_merged_groups_where_they_end(self):
        image = Image.new("RGB", (64, 16))
        drawn = np.asarray(draw_tokens(image, torch.tensor([[0, 0, 1, 1]])))
        white = (drawn == BORDER).all(-1)
        assert white.all(0).nonzero()[0].tolist() == [31, 32]
        assert white.sum() == 2 * 16

    def test_members_of_a_fused_token_have_their_own_tint(self):
        image = photograph(64, 16)
        tokens = full_map((1, 4)).fuse(torch.tensor([[2, 0, 1]]), 2)  # keeps 2 and 0, fuses 1 and 3
        before, drawn = np.asarray(image, dtype=float), np.asarray(draw_tokens(image, tokens))
        tint, share = TINTS[FUSED]
        for patch in (1, 3):
            place = np.s_[:, 16 * patch : 16 * patch + 16]
            expected = (1 - share) * before[place].mean(-1, keepdims=True) + share * np.array(tint)
            assert np.abs(drawn[place] - expected).max() <= 0.5 + 1e-9
        for patch in (0, 2):
            place = np.s_[:, 16 * patch : 16 * patch + 16]
            assert np.array_equal(drawn[place], before[place])

    def test_labels_draw_as_their_map(self):
        tokens = full_map((2, 4)).keep(torch.tensor([[1, 6]]), 2)
        image = photograph()
        assert np.array_equal(draw_tokens(image, tokens), draw_tokens(image, tokens.labels()[0]))

    def test_image_size_need_not_be_a_multiple_of_the_grid(self):
        assert draw_tokens(photograph(101, 53), full_map((4, 7)).keep(torch.tensor([[3]]), 1)).size == (
            101,
            53,
        )

    def test_several_images_are_refused(self):
        tokens = TokenMap.full(torch.zeros(3, 5, 4), (2, 2), 1, 1)
        with pytest.raises(ValueError, match="draws one image, but the TokenMap is of 3"):
            draw_tokens(photograph(), tokens)

    def test_labels_without_a_grid_are_refused(self):
        with pytest.raises(ValueError, match=r"labels must be \(H, W\), got a tensor of shape \(8,\)"):
            draw_tokens(photograph(), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("blocks", "shown"),
    [
        (range(12), [1, 3, 6, 8, 11]),
        ((3, 6, 9), [3, 6, 9]),
        (range(3, 12), [3, 5, 7, 9, 11]),
        (range(7), [0, 1, 3, 4, 6]),
    ],
)
def test_shown_stages_are_spread_evenly_and_end_with_the_last(blocks, shown):
    assert spread(blocks, 5) == shown


class TestTokenFigure:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_has_a_picture(self, method):
        """A column for the image and one for each block that reduces; those of K-Medoids that only weigh have none."""
        model = make_model(method, "class_token")
        figure = token_figure(model, photograph())
        assert figure.mode == "RGB"
        acting = [block for block, reducer in model.reducers.items() if not reducer.serves]
        assert figure.width > 300 * (1 + len(acting))

    def test_same_input_gives_the_same_pixels(self):
        model = effvit.sparsify(tiny_vit(), "tome", r=2)
        first, second = (token_figure(model, photograph()).tobytes() for _ in range(2))
        assert first == second

    def test_grid_need_not_be_square(self):
        model = effvit.sparsify(tiny_vit((32, 96)), "tome", r=2)
        assert (
            token_figure(model, photograph()).height
            < token_figure(effvit.sparsify(tiny_vit((96, 32)), "tome", r=2), photograph()).height
        )

    def test_model_is_left_as_it_was(self):
        model = effvit.sparsify(tiny_vit(), "tome", r=2).train()
        token_figure(model, photograph())
        assert all(module.training for module in model.modules())

    def test_model_without_reducing_block_shows_the_input_alone(self):
        model = effvit.sparsify(tiny_vit(), "tome", r=0)
        assert token_figure(model, photograph()).width < 2 * 300

    def test_title_replaces_method_and_settings(self):
        model = effvit.sparsify(tiny_vit(), "tome", r=2)
        assert token_figure(model, photograph(), title="x") != token_figure(model, photograph())

    def test_dense_model_is_refused(self):
        with pytest.raises(TypeError, match=r"made by effvit\.sparsify and in .*, got a VisionTransformer"):
            token_figure(tiny_vit(), photograph())

    @pytest.mark.parametrize("case", ["stvit", "stvit_swin", "supertoken", "lookupvit", "sit"])
    def test_architecture_with_soft_tokens_has_a_picture(self, case):
        model = make_architecture(case, **({"img_size": 64} if case in ("stvit", "lookupvit", "sit") else {}))
        stages = token_stages(model, photograph())
        figure = token_figure(model, photograph())
        assert figure.width > 250 * (1 + min(5, len(stages)))

    def test_stages_are_of_the_picture_the_model_sees(self):
        model = effvit.sparsify(tiny_vit(), "tome", r=2)
        maps = [features.tokens for features in model.eval().trace_tokens(load_images(model, [photograph()]))]
        for stage in token_stages(model, photograph()):
            assert np.array_equal(stage.labels, maps[stage.block].labels()[0])


def test_soft_groups_have_a_colour_each_and_borders():
    labels = np.array([[0, 0, 1, 1]])
    drawn = np.asarray(
        paint(Image.new("RGB", (64, 16), (90, 90, 90)), Stage(0, 2, labels, assignment=np.eye(2)[labels]))
    )
    assert (drawn[8, 31] == BORDER).all()
    assert (drawn[8, 32] == BORDER).all()
    # Grey 90 and hsv(0, 3/4, 1) = (255, 63.75, 63.75) in equal shares; the other group has another hue.
    assert drawn[8, 8].tolist() == [172, 77, 77]
    assert len({tuple(pixel) for pixel in drawn[8]}) == 3


class TestTokenRecord:
    def test_record_holds_picture_and_stages(self):
        model = effvit.sparsify(tiny_vit(), "evit", reduce_at=[1, 2], keep_rate=0.5)
        record = as_object(token_record(model, photograph(), name="ramp", model_name="evit keep_rate=0.5", host="tiny"))
        assert json.loads(json.dumps(record)) == record
        assert (record["method"], record["host"], record["settings"]["keep_rate"]) == ("evit", "tiny", 0.5)
        head, _, data = record["picture"].partition(",")
        assert head == "data:image/png;base64"
        with Image.open(BytesIO(b64decode(data))) as picture:
            assert picture.tobytes() == seen_by(model, load_images(model, [photograph()])[0]).tobytes()
        for entry, stage in zip(record["stages"], token_stages(model, photograph()), strict=True):
            assert entry["labels"] == stage.labels.tolist()
            assert entry["fused"] == [stage.tokens - 1]  # the last token sums up the others
            assert not entry["soft"]

    def test_picture_of_a_few_pixels_is_enlarged(self):
        model = effvit.sparsify(timm.create_model("vit_nano_patch4_28").eval(), "tome", r=2)
        data = token_record(model, Image.new("L", (28, 28), 90), name="a", model_name="tome", host="nano").picture
        with Image.open(BytesIO(b64decode(data.partition(",")[2]))) as picture:
            assert picture.size == (8 * 28, 8 * 28)

    def test_record_of_an_architecture_has_no_method(self):
        model = make_architecture("stvit", img_size=64)
        record = token_record(model, photograph(), name="ramp", model_name="stvit", host=None)
        assert (record.method, record.settings) == (None, {})
        assert all(stage.soft for stage in record.stages)


def test_stack_shows_figures_below_each_other():
    sheet = stack([Image.new("RGB", (3, 2), "red"), Image.new("RGB", (5, 4), "blue")])
    assert sheet.size == (5, 6)
    assert [sheet.getpixel(place) for place in ((2, 1), (4, 1), (4, 2))] == [(255, 0, 0), (255,) * 3, (0, 0, 255)]


def test_models_are_named_by_method_or_architecture():
    assert model_text(effvit.sparsify(tiny_vit(), "tome", r=2)) == "tome r=2"
    assert model_text(make_architecture("sit")) == "sit_lvvit_tiny_224"


def test_text_names_only_settings_that_are_not_defaults():
    assert settings_text(effvit.sparsify(tiny_vit(), "tome", r=2)) == "tome r=2"
    model = effvit.sparsify(tiny_vit(), "evit", reduce_at=(1, 2))
    assert settings_text(model) == "evit reduce_at=[1, 2]"
    assert settings_text(effvit.sparsify(tiny_vit(), "ats")) == "ats"


def test_images_are_normalised_by_the_configuration_of_the_model():
    model = tiny_vit()
    x = load_images(model, [Image.new("L", (90, 70), 255)])
    assert x.shape == (1, 3, 64, 64)
    mean, std = (torch.tensor(data_config(model)[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(x[0], ((1 - mean) / std).expand(3, 64, 64))


def test_view_undoes_the_normalisation():
    model = tiny_vit((32, 96))
    image = photograph(96, 32)
    config = data_config(model)
    assert config["input_size"] == (3, 32, 96)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    assert np.array_equal(seen_by(model, (pixels - mean) / std), image)
