"""Files of transformers, open_clip, CLIP, DINOv2, DINOv3 and SAM are read into timm's hosts.

Here they are written by ``foreign_files``, from their lists of names, and what comes back must be the weights they
were made of. Beside them, tests/test_transformers_checkpoints.py holds those of transformers to its models.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import foreign_files
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import effvit
from effvit.cli import main
from effvit.hosts.checkpoints import convert_checkpoint
from effvit.hosts.foreign_names import FAMILIES, find_tower

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
SAM: dict[str, Any] = TINY | {"window_size": 3, "global_attn_indexes": (1,), "neck_chans": 8, "num_classes": 0}
V3 = "DINOv3 of transformers"
# Kind -> the writer of the file, the host and its keywords, the family's name, and what of the file is dropped.
CASES: dict[str, tuple[foreign_files.Writer, str, dict[str, Any], str, set[str]]] = {
    "DINOv3 of transformers": (
        *(foreign_files.dinov3_of_transformers, "vit_small_patch16_dinov3_qkvb", TINY, V3),
        {"embeddings.mask_token"},
    ),
    "DINOv3 of transformers, zero biases": (
        *(foreign_files.dinov3_of_transformers, "vit_small_patch16_dinov3", TINY, V3),
        {
            "embeddings.mask_token",
            *(f"layer.{block}.attention.{part}_proj.bias" for block in (0, 1) for part in "qv"),
        },
    ),
    "DINOv3": (
        *(foreign_files.dinov3, "vit_small_patch16_dinov3_qkvb", TINY, "DINOv3"),
        {"mask_token", "rope_embed.periods", *(f"blocks.{block}.attn.qkv.bias_mask" for block in (0, 1))},
    ),
    "DINOv2": (foreign_files.dinov2, "vit_small_patch14_dinov2", TINY, "DINOv2", {"mask_token"}),
    "DINOv2 with registers": (foreign_files.dinov2, "vit_small_patch14_reg4_dinov2", TINY, "DINOv2", {"mask_token"}),
    "ViT of transformers": (
        *(foreign_files.vit_of_transformers, "vit_base_patch16_224", TINY | {"num_classes": 5}, "ViT of transformers"),
        set(),
    ),
    "CLIP": (
        *(foreign_files.clip, "vit_base_patch16_clip_quickgelu_224", TINY | {"num_classes": 16}),
        *("CLIP, original or of open_clip", {"logit_scale", "transformer.resblocks.0.ln_1.weight"}),
    ),
    "SigLIP of open_clip": (
        *(foreign_files.open_clip_with_timm, "vit_base_patch16_siglip_224", TINY, "a tower of timm in open_clip"),
        {"logit_bias", "text.token_embedding.weight"},
    ),
    "SAM": (
        *(foreign_files.sam, "samvit_base_patch16", SAM, "SAM"),
        {"prompt_encoder.no_mask_embed.weight", "mask_decoder.iou_token.weight"},
    ),
}


def drawn(name: str, **settings: Any) -> nn.Module:
    """A model whose weights are drawn, also where timm would start at zero; but no bias that a file does not have."""
    model = timm.create_model(name, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if "clip" in name and "siglip" not in name:
            model.get_parameter("head.bias").zero_()
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
@pytest.mark.parametrize("kind", CASES)
def test_file_gives_back_the_weights_it_was_made_of(kind: str, prefix: str, tmp_path: Path) -> None:
    write, name, settings, family, dropped = CASES[kind]
    model = drawn(name, **settings)
    file = {prefix + entry: value.contiguous() for entry, value in write(model).items()}
    torch.save(file, tmp_path / "file.pth")
    conversion = convert_checkpoint(timm.create_model(name, **settings), tmp_path / "file.pth")
    assert conversion.family == family
    for entry, value in model.state_dict().items():
        torch.testing.assert_close(conversion.state[entry], value, rtol=0, atol=1e-6, msg=entry)
    assert conversion.state.keys() == model.state_dict().keys()
    assert {entry.removeprefix(prefix) for entry in conversion.dropped} >= dropped
    assert all(prefix + entry in file for entry in dropped)


@pytest.mark.parametrize("kind", CASES)
def test_every_entry_is_used_renamed_or_dropped(kind: str, tmp_path: Path) -> None:
    """An entry of the report is dropped exactly if the weights do not change with it, so change it."""
    write, name, settings, _, _ = CASES[kind]
    model = drawn(name, **settings)
    file = {entry: value.clone() for entry, value in write(model).items()}
    save_file(file, tmp_path / "file.safetensors")
    conversion = convert_checkpoint(model, tmp_path / "file.safetensors")
    assert {*conversion.same, *conversion.renamed, *conversion.made} == conversion.state.keys()
    zeros = "zero biases" in kind  # which are dropped only because they are zero
    changed = {entry: value if zeros else value + 1 for entry, value in file.items() if entry in conversion.dropped}
    save_file(file | changed, tmp_path / "changed.safetensors")
    again = convert_checkpoint(model, tmp_path / "changed.safetensors")
    assert all(torch.equal(value, again.state[entry]) for entry, value in conversion.state.items())
    for entry in file.keys() - conversion.dropped:
        one = {**file, entry: file[entry] + 1}
        save_file(one, tmp_path / "changed.safetensors")
        again = convert_checkpoint(model, tmp_path / "changed.safetensors")
        assert any(not torch.equal(value, again.state[name]) for name, value in conversion.state.items()), entry


def test_reduced_model_reads_them_too(tmp_path: Path) -> None:
    dense = drawn("vit_small_patch16_dinov3_qkvb", **TINY)
    torch.save(foreign_files.dinov3_of_transformers(dense), tmp_path / "file.pth")
    reduced = effvit.sparsify(timm.create_model("vit_small_patch16_dinov3_qkvb", **TINY), "tome", r=2).eval()
    effvit.load_checkpoint(reduced, tmp_path / "file.pth")
    images = torch.randn(2, 3, 32, 32)
    expected = effvit.sparsify(dense, "tome", r=2).eval()
    assert torch.equal(reduced(images), expected(images))


def test_position_table_of_another_size_is_used_not_dropped(tmp_path: Path) -> None:
    torch.save(foreign_files.clip(drawn("vit_base_patch16_clip_224", **TINY, num_classes=16)), tmp_path / "file.pth")
    larger = timm.create_model("vit_base_patch16_clip_224", **(TINY | {"img_size": 48}), num_classes=16)
    conversion = convert_checkpoint(larger, tmp_path / "file.pth")
    assert conversion.state["pos_embed"].shape == (1, 37, 24)
    assert "pos_embed" in conversion.made
    assert "visual.positional_embedding" not in conversion.dropped


def test_head_is_dropped_where_the_model_has_none(tmp_path: Path) -> None:
    torch.save(foreign_files.vit_of_transformers(drawn("vit_base_patch16_224", **TINY)), tmp_path / "file.pth")
    backbone = timm.create_model("vit_base_patch16_224", **TINY, num_classes=0)
    assert effvit.load_checkpoint(backbone, tmp_path / "file.pth") == ["classifier.weight", "classifier.bias"]


def test_command_line_names_the_family_and_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = "vit_small_patch16_dinov3"
    settings = [text for name, value in TINY.items() for text in ("--set", f"{name}={value}")]
    torch.save(foreign_files.dinov3_of_transformers(drawn(host, **TINY)), tmp_path / "file.pth")
    assert main(["convert", str(tmp_path / "file.pth"), "--model", host, *settings, "--keys"]) == 0
    said = capsys.readouterr().out
    assert "named as DINOv3 of transformers" in said
    assert "renamed: embeddings.register_tokens -> reg_token" in said
    assert "joined, split or new: blocks.0.attn.qkv.weight" in said
    assert "dropped: embeddings.mask_token" in said


class TestRefusals:
    def refused(self, tmp_path: Path, file: dict[str, Any], name: str, message: str, **settings: Any) -> None:
        torch.save(file, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=message) as caught:
            effvit.load_checkpoint(timm.create_model(name, **(TINY | settings)), tmp_path / "file.pth")
        assert len(str(caught.value)) < 1500

    def test_biases_other_than_zero_are_not_lost(self, tmp_path: Path) -> None:
        """timm's filter would drop them without a word."""
        for write in (foreign_files.dinov3_of_transformers, foreign_files.dinov3):
            file = write(drawn("vit_small_patch16_dinov3_qkvb", **TINY))
            message = r"blocks\.0\.attn\.\S+ is a bias .* not zero, .* a name that ends in _qkvb"
            self.refused(tmp_path, file, "vit_small_patch16_dinov3", message)

    def test_another_host_is_refused_with_the_family(self, tmp_path: Path) -> None:
        file = foreign_files.dinov3_of_transformers(drawn("vit_small_patch16_dinov3", **TINY))
        message = r"file\.pth \(DINOv3 of transformers\) is a checkpoint of another model than this VisionTransformer"
        self.refused(tmp_path, file, "vit_base_patch16_224", message)

    def test_classifier_that_is_not_in_the_file_is_not_made_up(self, tmp_path: Path) -> None:
        file = foreign_files.vit_of_transformers(drawn("vit_base_patch16_224", **TINY))
        file = {name: value for name, value in file.items() if "classifier" not in name}
        self.refused(tmp_path, file, "vit_base_patch16_224", r"head\.weight is missing.*num_classes")

    def test_unknown_names_of_a_tower_are_not_dropped(self, tmp_path: Path) -> None:
        file = foreign_files.vit_of_transformers(drawn("vit_base_patch16_224", **TINY))
        file["vit.embeddings.detection_tokens"] = torch.zeros(1, 5, 24)  # of YOLOS
        self.refused(tmp_path, file, "vit_base_patch16_224", r"embeddings\.detection_tokens is not a parameter")

    def test_unknown_file_is_refused_with_what_is_known(self, tmp_path: Path) -> None:
        file = {f"stages.{i}.conv.weight": torch.zeros(3) for i in range(9)} | {"\x1b[31m.bias": torch.zeros(3)}
        message = r"none of its 10 entries is named as in timm, .*ViT of transformers, .*begin with stages, \\x1b\[31m"
        self.refused(tmp_path, file, "vit_base_patch16_224", message)

    def test_names_of_a_live_model_of_transformers_are_told_the_way(self, tmp_path: Path) -> None:
        """Its state_dict has other names since version 5 than what save_pretrained writes."""
        file = {f"vit.layers.{i}.attention.q_proj.weight": torch.zeros(24, 24) for i in range(2)}
        self.refused(tmp_path, file, "vit_base_patch16_224", r"of a model of transformers by its save_pretrained")

    def test_two_towers_are_refused_with_their_names(self, tmp_path: Path) -> None:
        vit = foreign_files.vit_of_transformers(drawn("vit_base_patch16_224", **TINY))
        both = {f"{side}.{name}": value for side in ("student", "teacher") for name, value in vit.items()}
        message = r"holds 2 vision towers \(ViT of transformers under student\.vit\.; .* under teacher\.vit\.\)"
        self.refused(tmp_path, both, "vit_base_patch16_224", message)

    def test_flattened_patches_of_siglip_2_are_refused(self, tmp_path: Path) -> None:
        """The names are those of SigLIP, and timm's filter would take the kernel in another order of its values."""
        file = {
            f"vision_model.{mark}": torch.zeros(24)
            for family in FAMILIES
            for mark in family.marks[:3]
            if family.name == "SigLIP of transformers"
        }
        file["vision_model.embeddings.patch_embedding.weight"] = torch.zeros(24, 192)
        file["vision_model.embeddings.position_embedding.weight"] = torch.zeros(16, 24)
        self.refused(tmp_path, file, "vit_base_patch16_siglip_224", r"kernel \(24, 192\).* NaFlex .* \(C, 3, P, P\)")

    @pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "SAM"])
    def test_mutated_file_loads_or_is_a_value_error(self, kind: str, tmp_path: Path) -> None:
        """Each entry once without its last row, once without all, and once as another kind of array."""
        write, name, settings, _, _ = CASES[kind]
        model = drawn(name, **settings)
        file = write(model)
        refused: list[str] = []
        for entry in [entry for entry in file if not re.search(r"(layer|blocks|resblocks)\.1\.", entry)]:
            value = torch.atleast_1d(file[entry])
            for odd in (value[:-1], value[:0], value.sum(), value.unsqueeze(0), value.to(torch.int8)):
                torch.save({**file, entry: odd}, tmp_path / "file.pth")
                try:
                    convert_checkpoint(model, tmp_path / "file.pth")
                except ValueError as error:
                    refused.append(str(error))
        assert len(refused) > 40
        assert max(map(len, refused)) < 1500


def test_names_of_timm_are_of_no_family() -> None:
    for name in (
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "samvit_base_patch16",
    ):
        assert find_tower(timm.create_model(name, **(TINY if "sam" not in name else SAM)).state_dict()) is None
