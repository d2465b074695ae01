"""The cut of the golden cases that lies in tests/golden, so that a checkout alone compares with the official code.

    python tools/cut_golden.py ../shared/golden

copies the cases of ``CASES`` unchanged, json and tensors, but for those of which ``PARTS`` takes some tensors alone:
numbers that the official code, or a reference where there is none, gave for random weights and images; no code and no
published weights. It removes from the cut what is not listed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors.torch import load_file, save

from effvit.messages import run_command

__all__ = ["CASES", "CUT", "PARTS", "TOO_LARGE", "main"]

CUT = Path(__file__).resolve().parents[1] / "tests" / "golden"
LARGEST = 9_700_000
"""Bytes of the whole cut; every clone pays for them, in each version that is ever committed."""

# Folder -> cases. The smallest that together run every function of a method, which are those of its functions alone and
# one or two of whole models; of an architecture the smallest whole model, with gradients where there is one, and the
# shortest list of official names.
CASES: dict[str, tuple[str, ...]] = {
    # given counts; resized position table with the fused token
    "evit": ("p4_tokens_override_nofuse", "p5_posinterp_48to64_fuse", "keep_rate_schedule"),
    # every matching; a model clamped to half of its tokens
    "tome": ("f_matching_functions", "p2_r40_clamped_half", "parse_r"),
    # every selection and propagation; a model with a sparse mixed graph
    "gtp": ("f_select_propagate_all_rules", "p6_summax_mixed_s05"),
    # blocks alone with padded slots; a model whose tokens are dropped in four blocks
    "ats": ("a3_dim32_h2_d5_img32p8_ats1234_drop_b1", "a6_blocks_refK_dim32_h2_n50_K80_30_nodrop_b2"),
    # both rankings, both partitions, a model
    "zero_tprune": (
        "a1_wpr_b2_h3_n20",
        "b1_eir_vhf_b3_h4_n26_it5_cls",
        "c1_sstage_b2_n24_d16_r5_sequ",
        "c2_sstage_b2_n21_d12_r4_alternate",
        "d1_model_dim32_h4_d4_img64p8",
    ),
    # matching and virtual unmerging; a model that merges image by image
    "dymu": ("f_matching_functions", "f_vtu_kernel", "p8_instance_level", "r_schedule"),
    # both merges alone: the smallest model has 600 KB
    "algm": ("f_merge_functions",),
    "attentive_mask": ("f_masks_r25", "f_masks_r50"),
    # clusters and reconstruction alone; the SAM encoder in windows
    "expedite": ("rect_12x20_4x6", "sam_encoder_112"),
    # decisions of given noise, and all losses
    "dynamicvit": ("p3_train_grad_mse",),
    "diffrate": ("compression_rate",),
    "hot": ("mixste_27_9", "keys_hot_mixste"),
    # both rules of matching; whole models lie in the folder of all cases
    "pitome": ("f_matching",),
    "mctf": ("p3_precise_step2",),
    "vid_tldr": ("f_merge",),
    "cubistmerge": ("f_merge_grid",),
    # all linkages, with and without a class token; its models are ten times as large
    "atc": ("f_clustering",),
    # both orders on four grids; a whole model of one of them, which differ in nothing else
    "static_controls": (
        "f_uniform_random",
        "p2_random_seed3",
        "heuristic_counts_table",
        "heuristic_contiguous_table",
    ),
    # selectors: the smallest of each kind of choice
    "visionzip": ("p3_step_one",),
    "divprune": ("p3_round_half_even",),
    "cdpruner": ("p3_text",),
    "prumerge": ("p1_adaptive",),
    "todre": ("p3_k5_of_36",),
    "aim": ("p2_odd",),
    "matryoshka": ("p2_196_uneven",),
    "recoverable": ("p3_196",),
    "llava_mini": ("p2_1x1",),
    "hired": ("p2_1x3",),
    "globalcom2": ("p2_1x3_wide",),
    "holitom": ("p1_six_frames",),
    "casvit": ("cls_dist_64", "keys_rcvit_xs"),
    # the block with the other infusion; a model at three resolutions
    "lookupvit": (
        "a2_block_dim24_h3_n25_m4_softmaxvariant",
        "b2_model_multires_dim24_h3_d3_img48p8_base4_m3_m4_m5",
    ),
    "sit": ("keep05_112", "keys_sit_lvvit_tiny"),
    "stvit": ("keys_stvit_r_swin_small",),
    "stvit_deit_reconstruction": ("noglobal_grad_64",),
    # of the Swin forms the dense one, half as large as the classifier and of the same units
    "stvit_r_dense": ("nomask_grad_96x128",),
    "svit": ("grad_64", "keys_stvit_small"),
}

# Case -> how the names of the tensors begin that the cut has of it, where the whole of it is a large model for few more
# functions. Its reader compares what is there; the folder of all cases has the rest.
PARTS: dict[str, tuple[str, ...]] = {
    "dynamicvit/p3_train_grad_mse": ("stage", "output", "tokens", "last_decision", "labels", "teacher_", "loss"),
}


TOO_LARGE = ("dpcknn", "kmedoids", "sinkhorn", "patchmerger")
"""Folders of which no case is small enough: all hold whole models, the smallest of 240 KB. They are compared where the
folder of all cases lies."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make the cut; returns 2 after an error the caller can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path, help="folder of all golden cases, one sub-folder a method")
    parser.add_argument("--out", type=Path, default=CUT, metavar="DIR", help="default: tests/golden")
    arguments = parser.parse_args(argv)
    return run_command("cut_golden", lambda: cut(arguments.golden, arguments.out))


def cut(golden: Path, out: Path) -> None:
    """Copy the cases of ``CASES`` and print how large they are.

    Raises:
        FileNotFoundError: A case is not in the folder.
        ValueError: The cut would be larger than ``LARGEST``.
    """
    contents = [(path.relative_to(golden), content_of(path)) for path in chosen_files(golden)]
    size = sum(len(content) for _, content in contents)
    if size > LARGEST:
        raise ValueError(f"the cut may have {LARGEST} bytes, but these cases have {size}; choose smaller ones in CASES")
    for folder in CASES:
        shutil.rmtree(out / folder, ignore_errors=True)
    for place, content in contents:
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_bytes(content)
    print(f"{len(contents)} files of {sum(map(len, CASES.values()))} cases in {out}: {size / 2**20:.1f} MiB")


def content_of(path: Path) -> bytes:
    """A file of the cut: as it is, or the tensors that ``PARTS`` names."""
    starts = PARTS.get(f"{path.parent.name}/{path.stem}")
    if starts is None or path.suffix == ".json":
        return path.read_bytes()
    return save({name: value for name, value in load_file(path).items() if name.startswith(starts)})


def chosen_files(golden: Path) -> Iterator[Path]:
    """The json of each chosen case, and its tensors if it has any."""
    for folder, names in CASES.items():
        for name in names:
            path = golden / folder / f"{name}.json"
            if not path.is_file():
                raise FileNotFoundError(f"no golden case {path}; give the folder that holds all of them")
            yield path
            if path.with_suffix(".safetensors").is_file():
                yield path.with_suffix(".safetensors")


if __name__ == "__main__":
    sys.exit(main())
