"""The search for DiffRate's numbers of tokens, beyond what its official code is compared with in test_golden.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import effvit
from effvit.data.preparation import load_images
from effvit.hosts.rate_search import SearchedHost
from effvit.measure.closed_form import closed_form_macs
from effvit.reducers.diffrate_search import KeptNumber
from effvit.show.pictures import fashion_pictures


@pytest.fixture(scope="module")
def seeing() -> nn.Module:
    return timm.create_model("vit_nano_patch4_28", pretrained=True).eval()


@pytest.fixture(scope="module")
def labelled(seeing: nn.Module) -> tuple[Tensor, Tensor]:
    """The sixty garments that come with the package, and their classes."""
    found = fashion_pictures().values()
    return load_images(seeing, [picture.image for picture in found]), torch.tensor([p.label for p in found])


def counted(model: nn.Module) -> int:
    """Those of its multiply-adds that the search counts."""
    terms = closed_form_macs(model, (1, 28, 28))
    return sum(terms[name] for name in ("embedding", "projection", "attention", "mlp", "head"))


def reduced(dense: nn.Module, settings: dict[str, list[int]]) -> nn.Module:
    return effvit.sparsify(dense, "diffrate", recover=None, share=True, **settings)


def small(**changes: object) -> VisionTransformer:
    shape = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    return VisionTransformer(**{**shape, **changes}).eval()


def batches(number: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
    return repeat((torch.randn(2, 3, 24, 24), torch.tensor([0, 3])), number)


class TestNumber:
    def test_candidates_are_equally_likely_at_first(self) -> None:
        """Of 196 to 1 the mean is 98.5, and 99 patches stay."""
        assert KeptNumber(36, 4).candidates.tolist() == [36, 32, 28, 24, 20, 16, 12, 8, 4]
        assert KeptNumber(196, 1)().item() == 99

    def test_probability_of_a_place_is_that_of_larger_candidates(self) -> None:
        number = KeptNumber(10, 4)  # 10, 6 and 2
        number.logits.data.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
        expected = [1.0, 1.0, 0.8, 0.8, 0.8, 0.8, 0.5, 0.5, 0.5, 0.5]
        assert torch.allclose(number.stays(torch.arange(10)), torch.tensor(expected))

    def test_gradient_is_that_of_the_mean(self) -> None:
        number = KeptNumber(10, 3)
        number.logits.data.copy_(torch.tensor([0.1, 0.7, -0.4, 0.2]))
        (gradient,) = torch.autograd.grad(number(), number.logits)
        share = number.logits.detach().softmax(0)
        mean = (share * number.candidates).sum()
        assert torch.allclose(gradient, share * (number.candidates - mean))


class TestPass:
    def test_masked_tokens_are_as_good_as_gone(self, labelled: tuple[Tensor, Tensor], seeing: nn.Module) -> None:
        """Up to the 1e-6 that the softmax with a policy leaves them; merging clamps sizes in the search alone."""
        searched = SearchedHost(seeing)
        for i, search in enumerate(searched.searches):
            search.prune.logits.data[:] = -100.0
            search.prune.logits.data[4 * i + 2] = 100.0  # the candidate 47 - 4 i
            search.merge.logits.data[:1] = 100.0  # all
        images = labelled[0]
        settings = searched.settings()
        assert settings["prune_to"] == [49, *range(47, 3, -4)]
        assert settings["merge_to"] == [49] * 12
        with torch.no_grad():
            scores, macs = searched(images)
            model = reduced(seeing, settings)
            assert (scores - model(images)).abs().max() < 1e-3 * scores.abs().max()
        assert macs.item() == counted(model)
        assert searched.macs(dense=True).item() == counted(seeing)

    def test_an_image_is_searched_as_alone(self, labelled: tuple[Tensor, Tensor], seeing: nn.Module) -> None:
        searched, images = SearchedHost(seeing, step=8), labelled[0][:3]
        with torch.no_grad():
            together = searched(images).scores
            assert torch.allclose(together[1:2], searched(images[1:2]).scores, atol=1e-5)


class TestSearch:
    def test_found_numbers_cost_what_was_asked_for_and_beat_the_first_guess(
        self, labelled: tuple[Tensor, Tensor], seeing: nn.Module
    ) -> None:
        seen: list[tuple[float, float]] = []
        settings = effvit.search_rates(
            seeing, repeat(labelled), 0.7, steps=15, lr=0.1, on_step=lambda *both: seen.append(both)
        )
        assert len(seen) == 15
        assert seen[-1][0] < seen[0][0] / 2
        found = reduced(seeing, settings)
        assert counted(found) / counted(seeing) == pytest.approx(0.7, abs=0.03)
        images, labels = labelled
        first = reduced(seeing, SearchedHost(seeing).settings())
        with torch.no_grad():
            right, at_first = ((model(images).argmax(1) == labels).sum() for model in (found, first))
        assert right > at_first

    @pytest.mark.filterwarnings("ignore:the numbers found take")
    def test_the_host_is_left_as_it_was(self) -> None:
        dense = small().train()
        dense.blocks[1].requires_grad_(False)
        before = {name: (value.clone(), value.requires_grad) for name, value in dense.named_parameters()}
        effvit.search_rates(dense, batches(), 0.5, steps=2)
        assert dense.training
        assert all(module.training for module in dense.modules())
        for name, value in dense.named_parameters():
            assert torch.equal(value, before[name][0])
            assert value.requires_grad == before[name][1]
            assert value.grad is None

    @pytest.mark.filterwarnings("ignore:the numbers found take")
    def test_steps_lead_along_the_official_schedule(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """AdamW without decay, a cosine from lr to a tenth of it."""
        rates: list[float] = []

        class Recording(torch.optim.AdamW):
            def step(self, closure: object = None) -> None:  # type: ignore[override]
                assert self.defaults["weight_decay"] == 0
                rates.append(self.param_groups[0]["lr"])
                super().step()

        monkeypatch.setattr(torch.optim, "AdamW", Recording)
        effvit.search_rates(small(), batches(), 0.5, steps=4, lr=0.02)
        assert rates == pytest.approx([0.02 * (0.1 + 0.45 * (1 + math.cos(math.pi * i / 4))) for i in range(4)])


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"macs": 1.5}, "macs must be in"),
            ({"steps": 0}, "steps must be"),
            ({"step": 0}, "step must be"),
            ({"lr": 0.0}, "lr must be above 0 and weight at least 0, got 0.0 and"),
            ({"weight": -1.0}, r"got 0\.01 and -1\.0"),
            ({"steps": 101}, "101 steps take as many batches, got 100"),
        ],
    )
    def test_values_out_of_range(self, changes: dict[str, float], message: str) -> None:
        options: dict[str, float] = {"macs": 0.5, "steps": 2, **changes}
        with pytest.raises(ValueError, match=message):
            effvit.search_rates(small(), batches(), **options)  # type: ignore[arg-type]

    def test_hosts_without_a_class_token_and_with_windows(self) -> None:
        with pytest.raises(ValueError, match="class token"):
            SearchedHost(small(class_token=False, global_pool="avg"))
        with pytest.raises((TypeError, ValueError), match="diffrate"):
            SearchedHost(timm.create_model("swin_tiny_patch4_window7_224"))

    def test_images_of_another_size(self) -> None:
        searched = SearchedHost(small(dynamic_img_size=True))
        with pytest.raises(
            ValueError, match=r"searched for images of 24 x 24, got 32 x 32; resize them, or the host by"
        ):
            searched(torch.zeros(1, 3, 32, 32))

    def test_a_host_without_classes_and_a_single_candidate(self) -> None:
        with pytest.raises(ValueError, match="the host has num_classes=0; give a classifier"):
            SearchedHost(small(num_classes=0))
        with pytest.raises(ValueError, match="step must leave several candidates of 36 patches, got 36"):
            SearchedHost(small(), step=36)

    def test_an_aim_that_was_missed_is_said(self) -> None:
        with pytest.warns(
            UserWarning, match=r"the numbers found take 0\.\d\d of the dense model's multiply-adds, not 0\.05"
        ):
            effvit.search_rates(small(), batches(), 0.05, steps=1)

    def test_a_host_of_one_block_has_no_numbers(self) -> None:
        with pytest.raises(ValueError, match="at least two blocks"):
            SearchedHost(small(depth=1))

    def test_a_loss_that_is_not_finite(self) -> None:
        dense = small()
        dense.head.bias.data[0] = float("inf")
        with pytest.raises(ValueError, match=r"the loss of step 0 is (nan|inf); lower lr, or use float32"):
            effvit.search_rates(dense, batches(), 0.5, steps=2)
