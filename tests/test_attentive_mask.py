"""Attentive masking: which patches stay, scores of a teacher and of another crop, and a training on real images."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hosts import make_host, make_images, make_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import to_tensor

import effvit
from effvit.hosts.attentive_mask import attended_patches, mask_attentively, scores_in_view, tower_scores
from effvit.hosts.host import ReducedHost
from effvit.show.pictures import fashion_pictures


def plain(host: str = "class_token") -> ReducedHost:
    """A host with a method that merges nothing."""
    return effvit.sparsify(make_host(host), "tome", r=0)


class TestPatches:
    def test_blocks_with_the_largest_means_stay_whole_and_in_image_order(self) -> None:
        """4 x 6 patches are 6 blocks; int(6 / 3) + 1 of them stay."""
        scores = torch.zeros(1, 4, 6)
        scores[0, 0, 4] = 9  # one large entry
        scores[0, 2:, :2] = 2  # four small ones: mean 2
        scores[0, 2:, 2:4] = 2.5
        scores[0, :2, :2] = 1
        index = attended_patches(scores.flatten(1), (4, 6), 1 / 3)
        assert index.tolist() == [[4, 5, 10, 11, 12, 13, 14, 15, 18, 19, 20, 21]]

    def test_of_equal_scores_the_first_blocks_stay(self) -> None:
        """As outside of the teacher's view, where all are 0: the official sort may choose any."""
        assert attended_patches(torch.zeros(2, 9), (3, 3), 0.4, block=1).tolist() == [[0, 1, 2, 3]] * 2

    def test_ratio_of_one_keeps_every_patch(self) -> None:
        assert attended_patches(torch.rand(1, 16), (4, 4), 1.0).tolist() == [list(range(16))]

    @pytest.mark.parametrize(
        ("scores", "settings", "error", "message"),
        [
            (torch.zeros(2, 15), {}, ValueError, r"scores must be \(B, 16\) for a 4 x 4 grid, got \(2, 15\)"),
            (torch.zeros(16), {}, ValueError, r"scores must be \(B, 16\) for a 4 x 4 grid, got \(16,\)"),
            (torch.zeros(2, 16), {"block": 3}, ValueError, "block must divide the 4 x 4 patch grid, got 3; take 1"),
            (torch.zeros(2, 16), {"block": 0}, ValueError, "block must be at least 1, got 0"),
            (torch.zeros(2, 16), {"block": 0.5}, TypeError, "block must be a whole number, got 0.5"),
            (torch.zeros(2, 16), {"ratio": 0}, ValueError, r"ratio must be in \(0, 1\], got 0"),
            (torch.zeros(2, 16), {"ratio": 1.5}, ValueError, r"ratio must be in \(0, 1\], got 1.5"),
            (torch.full((2, 16), torch.nan), {}, ValueError, "attentive mask: scores are NaN for image 0"),
        ],
    )
    def test_bad_input(
        self, scores: torch.Tensor, settings: dict[str, float], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            attended_patches(scores, (4, 4), **settings)  # type: ignore[arg-type]


class TestViews:
    def test_the_same_view_keeps_the_scores_of_a_crop_of_as_many_pixels(self) -> None:
        scores = torch.rand(2, 12)
        view = [(5, 3, 3, 4)] * 2
        assert torch.allclose(scores_in_view(scores, (3, 4), view, view), scores)

    def test_half_of_a_view_has_the_scores_of_that_half_and_nothing_outside(self) -> None:
        scores = torch.arange(16.0).view(1, 16)
        half = scores_in_view(scores, (4, 4), [(0, 0, 4, 4)], [(0, 2, 4, 2)]).view(4, 4)
        assert half[:, 0].tolist() == [2, 6, 10, 14]  # half-pixel centres: the ends are those of the two columns
        assert half[:, 3].tolist() == [3, 7, 11, 15]
        outside = scores_in_view(scores, (4, 4), [(0, 0, 4, 4)], [(8, 8, 4, 4)])
        assert not outside.any()

    def test_numbers_and_sizes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="got scores of 2 images, 1 crops seen and 2 views; give one each"):
            scores_in_view(torch.zeros(2, 4), (2, 2), [(0, 0, 2, 2)], [(0, 0, 2, 2)] * 2)
        with pytest.raises(ValueError, match="crops must have pixels, got 0 x 2 and 2 x 2"):
            scores_in_view(torch.zeros(1, 4), (2, 2), [(0, 0, 0, 2)], [(0, 0, 2, 2)])


class TestTower:
    @pytest.mark.parametrize("host", ["class_token", "distilled", "registers", "eva02", "rope_mixed", "lvvit", "beit"])
    def test_training_sees_the_attended_patches_and_evaluation_all(self, host: str) -> None:
        model = plain(host).eval()
        x = make_images(model)
        number = model.patch_embed.num_patches
        scores = tower_scores(model, x)
        assert scores.shape == (2, number)
        assert (scores > 0).all()
        assert (scores.sum(1) < 1).all()  # the rest is that of prefix tokens
        student = mask_attentively(model, block=1)
        assert torch.equal(student(x), model(x))
        student.train()
        with student.token_drop.attending(scores):
            features = student.forward_tokens(x)
        index = attended_patches(scores, model.patch_embed.grid_size, block=1)
        assert features.x.shape[1] == model.num_prefix_tokens + index.shape[1]
        assert torch.equal(features.tokens.anchor, index)

    def test_masked_tower_computes_as_one_of_the_kept_patches_alone(self) -> None:
        """The expectation is timm's: its own blocks on the embedded patches that stay."""
        dense = make_host("class_token").double()
        x = make_images(dense).double()
        model = mask_attentively(effvit.sparsify(dense, "tome", r=0), train_only=False).eval()
        scores = torch.rand(2, 48, dtype=torch.float64)
        with model.token_drop.attending(scores):
            own = model(x)
        embedded = dense._pos_embed(dense.patch_embed(x))
        index = attended_patches(scores, (6, 8)) + 1
        kept = torch.stack([y[torch.cat([torch.tensor([0]), i])] for y, i in zip(embedded, index, strict=True)])
        assert torch.allclose(own, dense.forward_head(dense.norm(dense.blocks(dense.norm_pre(kept)))), atol=1e-10)

    def test_methods_reduce_further(self) -> None:
        model = mask_attentively(make_model("evit", "class_token")).train()
        x = make_images(model)
        with model.token_drop.attending(torch.rand(2, 48)):
            model(x).sum().backward()
        assert model.patch_embed.proj.weight.grad is not None
        assert model.eval()(x).isfinite().all()

    def test_copies_mask_too(self) -> None:
        model = mask_attentively(plain()).train()
        x, scores = make_images(model), torch.rand(2, 48)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with again.token_drop.attending(scores):
                assert again.forward_tokens(x).x.shape[1] == 1 + 4 * 7

    def test_what_is_missing_is_named(self) -> None:
        model = mask_attentively(plain()).train()
        x = make_images(model)
        with pytest.raises(
            ValueError, match=r"attentive masking needs scores; run the model inside `with model.token_d"
        ):
            model(x)
        message = "got scores of 3 images for a batch of 2; give a row for each"
        with pytest.raises(ValueError, match=message), model.token_drop.attending(torch.rand(3, 48)):
            model(x)
        with pytest.raises(ValueError, match="block must divide the 6 x 8 patch grid, got 4"):
            mask_attentively(plain(), block=4)
        with pytest.raises(TypeError, match=r"expected a model made by effvit.sparsify, got VisionTransformer"):
            mask_attentively(make_host("class_token"))

    def test_teachers_that_cannot_be_read_are_refused(self) -> None:
        x = make_images(plain())
        with pytest.raises(ValueError, match="attention of a class token, of which this tower has none"):
            tower_scores(plain("average_pool").eval(), x)
        with pytest.raises(ValueError, match=r"from a teacher that sees every patch; call eval\(\) on it"):
            tower_scores(plain().train(), x)
        with pytest.raises(ValueError, match="scores need every patch in every block, but evit reduces them"):
            tower_scores(make_model("evit", "class_token"), x)


def test_loss_falls_on_real_images_with_an_averaged_teacher() -> None:
    """Sixty garments of the package; the student sees 28 of 49 patches, the teacher is its average."""
    torch.manual_seed(0)
    pictures = list(fashion_pictures().values())
    x = torch.stack([to_tensor(image.convert("L")) for image, _ in pictures])
    x, y = (x - 0.2860) / 0.3530, torch.tensor([label for _, label in pictures])
    student = effvit.sparsify(timm.create_model("vit_nano_patch4_28", depth=2), "tome", r=0)
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9)).eval()
    student = mask_attentively(student, block=1).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    seen = []
    for _ in range(25):
        with student.token_drop.attending(tower_scores(teacher.module, x)):
            loss = F.cross_entropy(student(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(student)
        seen.append(loss.item())
    assert seen[-1] < 0.75 * seen[0]


def test_tower_of_open_clip_is_masked_in_training(tmp_path: Path) -> None:
    """Through its timm tower: half of the patches in training, all in evaluation, whose features stay the same."""
    open_clip = pytest.importorskip("open_clip", reason="the dev extra is not installed")
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    vision = {"timm_model_name": "deit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    file = tmp_path / "tiny-masked.json"
    file.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)
    clip = open_clip.create_model(file.stem).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = clip.encode_image(x)
        trunk = effvit.sparsify(clip.visual.trunk, "tome", r=0)
        clip.visual.trunk = mask_attentively(trunk)
        assert torch.allclose(clip.encode_image(x), expected, atol=1e-6)
        scores = tower_scores(trunk, x)
    clip.train()
    with clip.visual.trunk.token_drop.attending(scores):
        clip.encode_image(x).square().sum().backward()
        assert clip.visual.trunk.forward_tokens(x).x.shape[1] == 1 + 100  # int(49 / 2) + 1 blocks of 2 x 2 patches
