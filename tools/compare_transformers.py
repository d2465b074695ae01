"""Compare models of transformers with the hosts of timm that read their files: the same features, to how much.

    python tools/compare_transformers.py          # measure, and write record and table
    python tools/compare_transformers.py --check  # only say whether the table is that of the record

Models are small and their weights drawn, so that no file is fetched; ``make test-transformers`` has the environment.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from marked_table import put_table, write_pages
from safetensors.torch import load_file
from torch import nn

from effvit.hosts.checkpoints import convert_checkpoint

__all__ = ["CASES", "Case", "Comparison", "compare", "main", "table"]

ROOT = Path(__file__).resolve().parents[1]
RECORD = "docs/benchmarks/transformers_checkpoints.json"
PAGE, TOOL = "docs/checkpoints.md", "compare_transformers.py"
TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
SAM: dict[str, Any] = TINY | {"window_size": 3, "global_attn_indexes": (1,), "neck_chans": 8, "num_classes": 0}
WIDTHS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**WIDTHS, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
TEXT = {**WIDTHS, "intermediate_size": 24, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SAM_VISION = {**WIDTHS, "mlp_dim": 96, "image_size": 32, "patch_size": 8, "window_size": 3, "output_channels": 8}
PAIR = {"vision_config": VISION, "text_config": TEXT}


class Case(NamedTuple):
    """A class of transformers and a host of timm that computes the same.

    Attributes:
        model: Name of the class.
        config: Name of the class of its config.
        args: Of the config.
        host: Name of the host.
        settings: Keywords of the host that differ from ``TINY``.
        part: Attribute of the model that computes the features; empty for all of it.
        output: Attribute of the output that holds the features.
        compares: What is compared: "tokens" behind the final norm, or what the host returns ("scores").
    """

    model: str
    config: str
    args: dict[str, Any]
    host: str
    settings: dict[str, Any]
    part: str = ""
    output: str = "last_hidden_state"
    compares: str = "tokens"


LABELS = {**VISION, "num_labels": 5}
QUICK, TANH = "vit_base_patch16_clip_quickgelu_224", {"act_layer": "gelu_tanh"}
REGISTERS = {**VISION, "num_register_tokens": 4}
GATED = {**REGISTERS, "use_gated_mlp": True, "hidden_act": "silu"}
BEIT = "beit_base_patch16_224"
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "num_classes": 0}
CASES = (
    Case("ViTModel", "ViTConfig", VISION, "vit_base_patch16_224", {"num_classes": 0}),
    *(
        Case(
            f"{name}ForImageClassification{more}",
            f"{name}Config",
            args,
            host,
            {"num_classes": 5},
            "",
            "logits",
            "scores",
        )
        for name, more, args, host in (
            ("ViT", "", LABELS, "vit_base_patch16_224"),
            ("DeiT", "WithTeacher", LABELS, "deit_base_distilled_patch16_224"),
            ("Beit", "", {**LABELS, "use_relative_position_bias": True}, BEIT),
        )
    ),
    Case("BeitModel", "BeitConfig", {**VISION, "use_shared_relative_position_bias": True}, BEIT, SHARED),
    Case("Dinov2Model", "Dinov2Config", VISION, "vit_small_patch14_dinov2", {}),
    Case(
        *("Dinov2Model", "Dinov2Config", {**VISION, "use_swiglu_ffn": True}, "vit_giant_patch14_dinov2"),
        {"mlp_ratio": 128 / 24},
    ),
    Case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", REGISTERS, "vit_small_patch14_reg4_dinov2", {}),
    Case("DINOv3ViTModel", "DINOv3ViTConfig", REGISTERS, "vit_small_patch16_dinov3_qkvb", {}),
    Case("DINOv3ViTModel", "DINOv3ViTConfig", GATED, "vit_small_plus_patch16_dinov3_qkvb", {"mlp_ratio": 4}),
    Case("CLIPVisionModel", "CLIPVisionConfig", VISION, QUICK, {"num_classes": 0}, "", "pooler_output", "scores"),
    Case(
        *("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VISION, "projection_dim": 16}, QUICK),
        *({"num_classes": 16}, "", "image_embeds", "scores"),
    ),
    Case("CLIPModel", "CLIPConfig", PAIR, QUICK, {"num_classes": 0}, "vision_model", "pooler_output", "scores"),
    Case(
        *("SiglipVisionModel", "SiglipVisionConfig", VISION, "vit_base_patch16_siglip_224", TANH),
        *("", "pooler_output", "scores"),
    ),
    Case(
        *("SiglipModel", "SiglipConfig", PAIR, "vit_base_patch16_siglip_224", TANH),
        *("vision_model", "pooler_output", "scores"),
    ),
    Case(
        *("SamModel", "SamConfig", {"vision_config": {**SAM_VISION, "global_attn_indexes": [1]}}),
        *("samvit_base_patch16", SAM, "vision_encoder"),
    ),
)


class Comparison(NamedTuple):
    """What a file of transformers became in a host.

    Attributes:
        model: The class of transformers.
        host: timm's name of the host.
        family: Whose names the file has.
        used: Entries of the file that are used.
        dropped: Entries that are left out.
        features: What was compared.
        largest: Largest absolute value of it.
        difference: Largest absolute difference between the two.
    """

    model: str
    host: str
    family: str
    used: int
    dropped: int
    features: str
    largest: float
    difference: float


def drawn(model: nn.Module) -> nn.Module:
    """The model in eval mode, every parameter drawn, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def compare(case: Case) -> Comparison:
    """Write the model of a case as transformers does, read the file into its host, and run both on the same images."""
    import transformers

    config = getattr(transformers, case.config)(**case.args)
    theirs = drawn(getattr(transformers, case.model)(config))
    host: nn.Module = timm.create_model(case.host, **(TINY | case.settings)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        conversion = convert_checkpoint(host, Path(folder) / "model.safetensors")
        entries = len(load_file(Path(folder) / "model.safetensors"))
    host.load_state_dict(conversion.state)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    features: Any = host
    with torch.no_grad():
        expected = getattr(theirs.get_submodule(case.part)(images), case.output)
        found = features.forward_features(images) if case.compares == "tokens" else host(images)
    return Comparison(
        case.model,
        case.host,
        conversion.family or "",
        entries - len(conversion.dropped),
        len(conversion.dropped),
        case.output,
        expected.abs().max().item(),
        (found - expected).abs().max().item(),
    )


def table(record: dict[str, Any]) -> list[str]:
    """The table of a record."""
    rows = [
        f"| `{row['model']}` | {row['family']} | `{row['host']}` | {row['used']} | {row['dropped']} | "
        f"{row['difference']:.1e} of {row['largest']:.1f} |"
        for row in record["models"]
    ]
    head = (
        "| model of transformers | names | host of timm | used | dropped | largest difference, of the largest value |"
    )
    return [head, "| --- | --- | --- | ---: | ---: | ---: |", *rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure nothing, only compare the page with the record")
    arguments = parser.parse_args(argv)
    path = ROOT / RECORD
    if not arguments.check:
        import transformers

        versions = {"transformers": transformers.__version__, "timm": timm.__version__, "torch": torch.__version__}
        found = [compare(case)._asdict() for case in CASES]
        path.write_text(json.dumps({"versions": versions, "dtype": "float32", "models": found}, indent=1) + "\n")
    rows = table(json.loads(path.read_text()))
    page = put_table((ROOT / PAGE).read_text(), PAGE, "transformers", TOOL, rows)
    return write_pages({PAGE: page}, ROOT, TOOL, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
