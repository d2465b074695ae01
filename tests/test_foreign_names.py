"""Files of transformers, open_clip, CLIP, DINOv2, DINOv3, SAM and SAM 2 are read into timm's hosts.

Here they are written by ``foreign_files``, from their lists of names, and what comes back must be the weights they
were made of. Beside them, tests/test_transformers_checkpoints.py holds those of transformers to its models.
"""

from __future__ import annotations

import itertools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files
import pytest
import timm
import torch
from pages import example
from safetensors.torch import save_file
from torch import Tensor, nn

import effvit
from effvit.cli import main
from effvit.dense.backbone import DenseBackbone
from effvit.hosts._torchscript import read_torchscript
from effvit.hosts.checkpoints import convert_checkpoint, read_file
from effvit.hosts.foreign_names import FAMILIES, find_tower

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
SAM: dict[str, Any] = TINY | {"window_size": 3, "global_attn_indexes": (1,), "neck_chans": 8, "num_classes": 0}
SAM2: dict[str, Any] = {"embed_dim": 8, "stages": (1, 2), "q_pool": 1, "window_spec": (4, 4), "num_classes": 0}
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
    "SAM 2": (
        *(foreign_files.sam2, "sam2_hiera_tiny", SAM2, "SAM 2"),
        {
            "image_encoder.neck.convs.0.conv.weight",
            "memory_attention.layers.0.norm1.weight",
            "no_mem_embed",
            "sam_mask_decoder.iou_token.weight",
        },
    ),
}


def drawn(name: str, **settings: Any) -> Any:
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


class TestConfig:
    """What stands in the config.json that transformers writes beside the weights, and not in these."""

    def folder(self, tmp_path: Path, text: str) -> Path:
        file = foreign_files.vit_of_transformers(drawn("vit_base_patch16_224", **TINY, num_classes=5))
        save_file({name: value.contiguous() for name, value in file.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(text)
        return tmp_path / "model.safetensors"

    def host(self, **settings: Any) -> nn.Module:
        return timm.create_model("vit_base_patch16_224", **(TINY | settings), num_classes=5)

    @pytest.mark.parametrize(
        ("text", "settings"),
        [
            ('{"num_attention_heads": 2, "hidden_act": "gelu"}', {}),
            ('{"vision_config": {"num_attention_heads": 2, "hidden_act": "gelu_pytorch_tanh"}}', {}),
            ('{"hidden_act": "quick_gelu"}', {"act_layer": "quick_gelu"}),
            ('{"architecture": "vit_base_patch16_224"}', {}),
            ("[1]", {}),
        ],
    )
    def test_host_that_computes_the_same_is_taken(self, text: str, settings: dict[str, Any], tmp_path: Path) -> None:
        assert effvit.load_checkpoint(self.host(**settings), self.folder(tmp_path, text)) == []

    @pytest.mark.parametrize(
        ("text", "settings", "message"),
        [
            ('{"num_attention_heads": 3}', {}, r"3 heads of attention .* has 2; create the host with num_heads=3"),
            ('{"hidden_act": "quick_gelu"}', {}, r"computes 'quick_gelu' .* computes GELU; .*act_layer='quick_gelu'"),
            (
                '{"vision_config": {"hidden_act": "gelu"}}',
                {"act_layer": "quick_gelu"},
                r"computes 'gelu' .* computes QuickGELU; take the host without quickgelu",
            ),
            ("{", {}, r"config\.json cannot be read \(.*\); get it anew, or move the weights"),
            ("[" * 100_000, {}, r"config\.json cannot be read"),
        ],
    )
    def test_host_that_computes_otherwise_is_refused(
        self, text: str, settings: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            effvit.load_checkpoint(self.host(**settings), self.folder(tmp_path, text))


class Parts(nn.Module):
    """Modules and parameters under the names of a file, for TorchScript."""

    def __init__(self, file: foreign_files.Names) -> None:
        super().__init__()
        inner: dict[str, foreign_files.Names] = {}
        for name, value in file.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = value
            else:
                self.register_parameter(first, nn.Parameter(value))
        for name, parts in inner.items():
            self.add_module(name, Parts(parts))

    def forward(self, x: Tensor) -> Tensor:
        return x


class TestTorchScript:
    """OpenAI's files of CLIP; the program in them is never run, so that one may be written by anybody."""

    @pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")  # the files there are stay
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_weights_are_those_of_the_program(self, dtype: torch.dtype, tmp_path: Path) -> None:
        model = drawn("vit_base_patch16_clip_quickgelu_224", **TINY, num_classes=16).to(dtype)
        file = foreign_files.clip(model)
        torch.jit.save(torch.jit.script(Parts(file)), tmp_path / "ViT-B-16.pt")
        assert read_torchscript(tmp_path / "ViT-B-16.pt").keys() == file.keys()
        conversion = convert_checkpoint(model, tmp_path / "ViT-B-16.pt")
        assert conversion.family == "CLIP, original or of open_clip"
        assert all(torch.equal(value, conversion.state[name]) for name, value in model.state_dict().items())

    @pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # timm compares sizes
    def test_traced_model_comes_back(self, tmp_path: Path) -> None:
        """The program of a trace is compressed, and larger than what is left of the archive beside small weights."""
        model = drawn("vit_base_patch16_224", **(TINY | {"depth": 8}), num_classes=4).eval()
        size = model.patch_embed.img_size
        torch.jit.save(torch.jit.trace(model, torch.randn(1, 3, *size)), tmp_path / "traced.pt")
        with zipfile.ZipFile(tmp_path / "traced.pt") as archive:
            assert sum(e.file_size for e in archive.infolist()) > (tmp_path / "traced.pt").stat().st_size
        conversion = convert_checkpoint(model, tmp_path / "traced.pt")
        assert all(torch.equal(value, conversion.state[name]) for name, value in model.state_dict().items())

    def test_pickle_among_the_program_counts_as_it_unpacks(self, tmp_path: Path) -> None:
        """What is read to count its entries must not fill the memory."""
        path = tmp_path / "file.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("file/constants.pkl", b").")
            archive.writestr("file/code/large.pkl", bytes(1 << 20))
        with pytest.raises(ValueError, match="bytes would unpack to"):
            read_file(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"cbuiltins\neval\n(V1\ntR.", r"it asks for builtins\.eval"),
            (b"c__torch__.M\nM\n)\x81}(Vweight\nctorch\nload\nub.", r"it asks for torch\.load"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n}Vx\nI1\nsb.", "cannot be read as a checkpoint"),
            (b"c__torch__.M\nM\n}Vx\nI1\nsb.", "cannot be read as a checkpoint"),
            (b"c__torch__.M\nM\n)\x81(lb.", "none of its 0 entries"),
            (b"}.", "none of its 0 entries"),
            (b"", "cannot be read as a checkpoint"),
        ],
    )
    def test_anything_but_modules_and_tensors_is_refused(self, content: bytes, message: str, tmp_path: Path) -> None:
        path = tmp_path / "file.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("file/data.pkl", b"\x80\x02" + content)
            archive.writestr("file/constants.pkl", b"\x80\x02).")
        with pytest.raises(ValueError, match=message):
            effvit.load_checkpoint(timm.create_model("vit_base_patch16_clip_224", **TINY), path)


FAULTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x[:-1],
    lambda x: x[:0],
    lambda x: x.sum(),
    lambda x: x.unsqueeze(0),
    lambda x: x.to(torch.int8),
)


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
        self.refused(
            tmp_path, file, "vit_base_patch16_siglip_224", r"kernel \(24, 192\).* NaFlex .*naflexvit_.*\(C, 3, P, P\)"
        )

    @pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "SAM"])
    def test_mutated_file_loads_or_is_a_value_error(self, kind: str, tmp_path: Path) -> None:
        """Each entry with one of five faults in turn: without its last row, without all, as a scalar and so on."""
        write, name, settings, _, _ = CASES[kind]
        model = drawn(name, **settings)
        file = write(model)
        refused: list[str] = []
        entries = [entry for entry in file if not re.search(r"(layer|blocks|resblocks)\.1\.", entry)]
        for entry, fault in zip(entries, itertools.cycle(FAULTS), strict=False):
            torch.save({**file, entry: fault(torch.atleast_1d(file[entry]))}, tmp_path / "file.pth")
            try:
                convert_checkpoint(model, tmp_path / "file.pth")
            except ValueError as error:
                refused.append(str(error))
        assert len(refused) > 10
        assert max(map(len, refused)) < 1500


def test_names_of_timm_are_of_no_family() -> None:
    for name in (
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_dinov3",
        "samvit_base_patch16",
        "sam2_hiera_tiny",
    ):
        settings = SAM2 if "sam2" in name else SAM if "sam" in name else TINY
        assert find_tower(timm.create_model(name, **settings).state_dict()) is None


def test_dense_backbone_reads_them_and_their_config(tmp_path: Path) -> None:
    model = drawn("vit_small_patch16_dinov3_qkvb", **TINY)
    file = foreign_files.dinov3_of_transformers(model)
    save_file({name: value.contiguous() for name, value in file.items()}, tmp_path / "model.safetensors")
    options = {"out_indices": (1,), "final_norm": True, "pretrained": str(tmp_path / "model.safetensors")}
    backbone = DenseBackbone("vit_small_patch16_dinov3_qkvb", **TINY, **options).eval()
    backbone.load_pretrained()
    images = torch.randn(2, 3, 32, 32)
    maps = model.forward_intermediates(images, indices=[1], norm=True, intermediates_only=True)
    assert torch.equal(backbone(images)[0], maps[0])
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    with pytest.raises(ValueError, match="3 heads of attention"):
        backbone.load_pretrained()


def test_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dinov3").mkdir()
    file = foreign_files.dinov3_of_transformers(timm.create_model("vit_small_patch16_dinov3"))
    save_file(file, "dinov3/model.safetensors")
    names: dict[str, Any] = {}
    exec(example("checkpoints.md", "load_checkpoint"), names)
    assert torch.equal(names["cheap"].reg_token, file["embeddings.register_tokens"])
    assert "embeddings.mask_token" in names["dropped"]


def test_entries_that_are_one_tensor_are_both_used(tmp_path: Path) -> None:
    file = foreign_files.vit_of_transformers(drawn("vit_base_patch16_224", **TINY, num_classes=5))
    first, second = (f"vit.encoder.layer.{block}.layernorm_before.bias" for block in (0, 1))
    torch.save(file | {second: file[first]}, tmp_path / "file.pth")
    model = timm.create_model("vit_base_patch16_224", **TINY, num_classes=5)
    assert convert_checkpoint(model, tmp_path / "file.pth").dropped == []
