"""TAP and ADL: pooling and loss from their definitions, what they refuse, and a training on real images."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from hosts import make_host, make_images, make_model
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor
from torchvision.transforms.functional import to_tensor

import effvit
from effvit.hosts.attention_diversity import AttentionDiversity, attention_similarity
from effvit.hosts.token_pooling import TokenAwarePooling, dilated_mean, pool_tokens, pooling_macs
from effvit.measure.closed_form import closed_form_macs
from effvit.show.pictures import fashion_pictures


def slow_similarity(rows: Tensor, threshold: float) -> float:
    """The loss of one image's mean map (N, N), query by query."""
    number = len(rows)
    mean = rows.mean(0)
    mean = torch.where(mean > threshold / number, mean, torch.zeros_like(mean))
    found = []
    for row in rows:
        row = torch.where(row > threshold / number, row, torch.zeros_like(row))
        found.append(float(row @ mean) / max(float(row.norm() * mean.norm()), 1e-8))
    return sum(found) / number


class TestPooling:
    def test_mean_is_that_of_nine_positions(self) -> None:
        x = torch.randn(1, 2, 7, 6, dtype=torch.float64)
        for dilation in (1, 2, 3):
            padded = F.pad(x, (dilation,) * 4)
            at = [(i * dilation, j * dilation) for i in range(3) for j in range(3)]
            expected = sum(padded[:, :, top : top + 7, left : left + 6] for top, left in at) / 9
            assert torch.allclose(dilated_mean(x, dilation), expected)

    def test_one_scale_pools_nothing(self) -> None:
        """The softmax of one score is 1."""
        x = torch.randn(2, 1 + 12, 8)
        assert torch.equal(TokenAwarePooling(8, (3, 4), 1, num_scales=1).eval()(x), x)

    @pytest.mark.parametrize("host", ["class_token", "registers", "average_pool", "eva02", "lvvit"])
    def test_hosts_pool_patches_alone_and_keep_their_names(self, host: str) -> None:
        dense = make_host(host)
        pooled = pool_tokens(dense).eval()
        own, x = set(pooled.state_dict()), make_images(dense)
        assert own > set(dense.state_dict())
        assert all(".norm1.pool." in name for name in own - set(dense.state_dict()))
        assert not torch.allclose(pooled(x), dense(x))
        pool = pooled.blocks[0].norm1.pool
        tokens = torch.randn(2, dense.num_prefix_tokens + dense.patch_embed.num_patches, dense.embed_dim)
        assert torch.equal(pool(tokens)[:, : dense.num_prefix_tokens], tokens[:, : dense.num_prefix_tokens])

    def test_first_host_is_left_alone_and_copies_keep_their_own_pooling(self) -> None:
        dense = make_host("class_token")
        x = make_images(dense)
        before = dense(x)
        pooled = pool_tokens(dense).eval()
        assert torch.equal(dense(x), before)
        for again in (copy.deepcopy(pooled), pickle.loads(pickle.dumps(pooled))):
            assert torch.equal(again(x), pooled(x))
            with torch.no_grad():
                again.blocks[0].norm1.pool.dilation_predictor["proj"][2].weight.normal_()
            assert not torch.equal(again(x), pooled(x))

    def test_reduced_model_pools_up_to_its_first_reduction(self) -> None:
        model = make_model("evit", "class_token", reduce_at=(1,), keep_rate=0.5)
        x = make_images(model)
        assert pool_tokens(model, blocks=(0, 1)).eval()(x).isfinite().all()
        with pytest.raises(ValueError, match=r"on the 6 x 8 grid it was made for, 49 tokens with the prefix, got 26"):
            pool_tokens(model, blocks=(2,)).eval()(x)

    def test_macs_are_those_of_the_counter(self) -> None:
        dense = make_host("class_token")
        counted = [
            effvit.count_flops(model.eval(), (3, 48, 64)).by_operator.get("conv", 0)
            for model in (pool_tokens(dense, num_scales=3, blocks=(1,)), dense)
        ]
        assert counted[0] - counted[1] == pooling_macs(48, 32, 3)

    @pytest.mark.parametrize("host", ["class_token", "registers", "eva02", "lvvit"])
    def test_closed_form_is_the_count(self, host: str) -> None:
        """With a block that pools nothing too; a method that reduces behind the pooled blocks changes nothing of it."""
        dense = make_host(host)
        reduced = effvit.sparsify(dense, "tome", r=[0, 0, 4, 4])
        for model in (pool_tokens(dense, num_scales=3), pool_tokens(reduced, blocks=(0, 2))):
            size = (3, *make_images(dense).shape[2:])
            counted = effvit.count_flops(model.eval(), size, strict=True).total
            assert sum(closed_form_macs(model, size).values()) == counted

    def test_closed_form_of_another_grid_is_refused_as_the_image_is(self) -> None:
        model = pool_tokens(make_host("class_token", dynamic_img_size=True)).eval()
        for call in (lambda: closed_form_macs(model, (3, 64, 64)), lambda: model(torch.zeros(1, 3, 64, 64))):
            with pytest.raises(
                ValueError, match=r"on the 6 x 8 grid it was made for, 49 tokens with the prefix, got 65"
            ):
                call()

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"num_scales": 0}, ValueError, "num_scales must be at least 1, got 0"),
            ({"num_scales": 2.5}, TypeError, "num_scales must be a whole number, got 2.5"),
            ({"blocks": (4,)}, ValueError, "blocks names block 4, but the model has blocks 0 to 3"),
        ],
    )
    def test_setting_out_of_range(self, settings: dict[str, object], error: type[Exception], message: str) -> None:
        host = make_host("class_token")
        with pytest.raises(error, match=message):
            pool_tokens(host, **settings)  # type: ignore[arg-type]

    def test_model_without_such_blocks_and_model_that_pools(self) -> None:
        swin = SwinTransformer(img_size=32, patch_size=4, embed_dim=8, depths=(1,), num_heads=(1,), window_size=4)
        with pytest.raises(TypeError, match=r"in front of norm1 of timm's Block and EvaBlock, got a SwinTransformer"):
            pool_tokens(swin)
        with pytest.raises(ValueError, match="block 0 pools already; give the model without pooling"):
            pool_tokens(pool_tokens(make_host("class_token")))

    def test_model_whose_tokens_are_no_rows_of_one_grid(self) -> None:
        """NaFlexVit's grids differ from image to image, and Qwen's patches lie by the cells that are merged."""
        naflex = NaFlexVit(NaFlexVitCfg(patch_size=8, embed_dim=16, depth=2, num_heads=2), num_classes=3)
        qwen = timm.create_model("qwen3_vit_88m", img_size=64, embed_dim=16, depth=2, num_heads=2)
        for model in (naflex, effvit.sparsify(naflex, "tome", r=0), effvit.sparsify(qwen, "tome", r=0)):
            with pytest.raises(TypeError, match=rf"of a VisionTransformer or an Eva.* got a {type(model).__name__};"):
                pool_tokens(model)


class TestDiversity:
    @pytest.mark.parametrize("threshold", [1.0, 2.0])
    def test_loss_is_that_of_the_slow_search(self, threshold: float) -> None:
        weights = (3 * torch.randn(3, 2, 14, 14, dtype=torch.float64)).softmax(-1)
        expected = sum(slow_similarity(image.mean(0), threshold) for image in weights) / 3
        assert float(attention_similarity(weights, threshold)) == pytest.approx(expected, abs=1e-12)

    def test_loss_of_a_batch_is_the_mean_of_its_images(self) -> None:
        """Officially the loss of one image is another."""
        weights = (3 * torch.randn(3, 2, 14, 14, dtype=torch.float64)).softmax(-1)
        alone = torch.stack([attention_similarity(image[None]) for image in weights]).mean()
        assert torch.allclose(attention_similarity(weights), alone)

    def test_padding_is_neither_query_nor_key(self) -> None:
        weights = torch.zeros(2, 2, 9, 9, dtype=torch.float64)
        weights[0] = (3 * torch.randn(2, 9, 9, dtype=torch.float64)).softmax(-1)
        weights[1, :, :, :6] = (3 * torch.randn(2, 9, 6, dtype=torch.float64)).softmax(-1)
        valid = torch.arange(9) < torch.tensor([[9], [6]])
        alone = (attention_similarity(weights[:1]) + attention_similarity(weights[1:, :, :6, :6])) / 2
        assert torch.allclose(attention_similarity(weights, valid=valid), alone)

    def test_loss_is_largest_where_all_queries_attend_to_the_same_tokens(self) -> None:
        same = F.one_hot(torch.zeros(1, 1, 8, dtype=torch.int64), 8).double()
        assert float(attention_similarity(same)) == pytest.approx(1.0)
        assert float(attention_similarity(torch.eye(8, dtype=torch.float64)[None, None], 0.5)) < 0.4

    @pytest.mark.parametrize("method", ["tome", "evit", "ats", "algm", "gtp"])
    def test_every_method_trains_with_it_and_scores_stay_the_same(self, method: str) -> None:
        model = make_model(method, "class_token")
        x = make_images(model)
        with AttentionDiversity(model, threshold=0.5) as diversity:
            scores = model(x)
            loss = diversity.loss()
        assert 0 < loss <= 1
        loss.backward()
        assert model.blocks[0].attn.qkv.weight.grad is not None
        assert torch.equal(scores, model(x))
        assert not model.blocks[0].attn._forward_hooks

    def test_map_is_that_of_timm(self) -> None:
        """The expectation is made from timm's own products in the first block."""
        dense = make_host("class_token").double()
        x = make_images(dense).double()
        block, tokens = dense.blocks[0], dense._pos_embed(dense.patch_embed(x))
        q, k, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * block.attn.scale).softmax(-1)[:, :, 1:, 1:]
        with AttentionDiversity(effvit.sparsify(dense, "tome", r=0)) as diversity:
            diversity.model(x)
        assert torch.allclose(diversity.similarities[0], attention_similarity(weights))

    def test_what_cannot_be_read_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"expected a model made by effvit.sparsify, got VisionTransformer; .*r=0"):
            AttentionDiversity(make_host("class_token"))
        model = make_model("dymu", "class_token", ragged="packed")
        with pytest.raises(ValueError, match="threshold must be a positive number, got 0"):
            AttentionDiversity(model, 0)
        with AttentionDiversity(model) as diversity:
            with pytest.raises(ValueError, match="no attention was seen; run the model inside the with block"):
                diversity.loss()
            with pytest.raises(ValueError, match="a packed batch has no map; use ragged='padded'"):
                model(make_images(model))
        model.set_grad_checkpointing()
        with pytest.raises(ValueError, match="with gradient checkpointing every block would count twice"):
            AttentionDiversity(model)


def garments() -> tuple[Tensor, Tensor]:
    """The sixty Fashion-MNIST images of the package, normalised as its small model takes them, and their classes."""
    pictures = list(fashion_pictures().values())
    x = torch.stack([to_tensor(image.convert("L")) for image, _ in pictures])
    return (x - 0.2860) / 0.3530, torch.tensor([label for _, label in pictures])


def test_loss_of_both_falls_on_real_images() -> None:
    """From random weights, whose attention is even, so that it is the task that is learnt at first."""
    torch.manual_seed(0)
    x, y = garments()
    model = pool_tokens(effvit.sparsify(timm.create_model("vit_nano_patch4_28", depth=2), "tome", r=0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seen = []
    for _ in range(25):
        with AttentionDiversity(model) as diversity:
            loss = F.cross_entropy(model(x), y) + diversity.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.75 * seen[0]


def test_trained_attention_gets_more_diverse_on_real_images() -> None:
    """From the weights of the package, whose queries agree on some tokens; the task is learnt beside it."""
    torch.manual_seed(0)
    x, y = garments()
    model = effvit.sparsify(timm.create_model("vit_nano_patch4_28", pretrained=True), "tome", r=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    seen = []
    for _ in range(8):
        with AttentionDiversity(model) as diversity:
            task, diverse = F.cross_entropy(model(x), y), diversity.loss()
        optimizer.zero_grad()
        (task + diverse).backward()
        optimizer.step()
        seen.append(diverse.item())
    assert seen[-1] < 0.9 * seen[0]
