"""Checkpoints as trainers write them, read as timm reads them; and files of strangers, which end in a ValueError."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from architectures import make_architecture
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import effvit
from effvit.cli import main
from effvit.hosts.checkpoints import convert_checkpoint, official_state_dict


def small(**changes: Any) -> VisionTransformer:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return VisionTransformer(**(sizes | {"num_classes": 5} | changes))


def marked(value: float) -> dict[str, Tensor]:
    """A state_dict of ``small`` whose head is filled with the value."""
    state = small().state_dict()
    return {**state, "head.weight": torch.full_like(state["head.weight"], value)}


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


TRAINED, OTHER = marked(1.0), marked(2.0)
# Of each file the right answer is timm's own, load_state_dict of timm/models/_helpers.py.
AS_TIMM: dict[str, dict[str, Any]] = {
    "timm's trainer": {"state_dict": OTHER, "state_dict_ema": TRAINED, "epoch": 3},
    "averaged weights alone": {"state_dict_ema": TRAINED},
    "averaged weights of DDP": {"state_dict": OTHER, "state_dict_ema": prefixed("module.", TRAINED)},
    "DeiT's trainer": {"model": OTHER, "model_ema": TRAINED, "optimizer": {"state": {}}},
    "DeiT's trainer without averaging": {"model": TRAINED, "model_ema": None},
    "both averages": {"state_dict_ema": TRAINED, "model_ema": OTHER},
    "state_dict beside model": {"state_dict": TRAINED, "model": OTHER},
    "torch.compile": prefixed("_orig_mod.", TRAINED),
    "compiled DDP": {"state_dict": prefixed("_orig_mod.module.", TRAINED)},
    "DDP of a compiled model": {"model": prefixed("module._orig_mod.", TRAINED)},
}
# What timm's loader does not take; the sources are named where the order matters.
BEYOND_TIMM: dict[str, dict[str, Any]] = {
    "every prefix again": prefixed("_orig_mod.module.module._orig_mod.", TRAINED),
    "Lightning": {"state_dict": prefixed("model.", TRAINED), "pytorch-lightning_version": "2"},
    "Lightning, compiled": {"state_dict": prefixed("model._orig_mod.", TRAINED)},
    "backbone": {"state_dict": prefixed("module.backbone.", TRAINED)},
    "DeepSpeed": {"module": prefixed("module.", TRAINED), "lr_scheduler": None},
    "SlowFast": {"model_state": TRAINED},
    "torch's tutorial": {"model_state_dict": TRAINED, "loss": 0.1},
    "AveragedModel": {"n_averaged": torch.tensor(4), **prefixed("module.", TRAINED)},
    # mmengine's EMAHook.before_save_checkpoint swaps the two: the averaged weights are the state_dict
    "mmengine": {"state_dict": TRAINED, "ema_state_dict": {"steps": torch.tensor(2), **prefixed("module.", OTHER)}},
    "mmengine, averaged alone": {"ema_state_dict": {"steps": torch.tensor(2), **prefixed("module.", TRAINED)}},
    "FSDP": prefixed("_fsdp_wrapped_module.", TRAINED),
    "compiled block by block": {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", k): v for k, v in TRAINED.items()},
    "the one published network": {"teacher": prefixed("module.backbone.", TRAINED), "student": None},
}


@pytest.mark.parametrize("kind", AS_TIMM | BEYOND_TIMM)
def test_trainers_file_loads_the_weights_meant_for_use(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save((AS_TIMM | BEYOND_TIMM)[kind], path)
    reduced = effvit.sparsify(small(), "tome", r=2)
    effvit.load_checkpoint(reduced, path)
    assert all(torch.equal(value, TRAINED[name]) for name, value in reduced.state_dict().items())
    if kind in AS_TIMM:
        dense = small()
        timm.models.load_checkpoint(dense, str(path))
        assert torch.equal(dense.head.weight, TRAINED["head.weight"])


@pytest.mark.parametrize("case", ["stvit", "sit", "casvit", "supertoken", "lookupvit", "stvit_r_swin"])
def test_architectures_take_prefixes_and_averages_too(case: str, tmp_path: Path) -> None:
    model = make_architecture(case)
    zeros = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    torch.save({"model": zeros, "model_ema": prefixed("module._orig_mod.", model.state_dict())}, tmp_path / "file.pth")
    fresh = make_architecture(case)
    effvit.load_checkpoint(fresh, tmp_path / "file.pth")
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


class TestTwoNetworks:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "dino.pth"
        content = {"student": prefixed("module.backbone.", OTHER), "teacher": prefixed("backbone.", TRAINED)}
        torch.save({**content, "epoch": 3}, path)
        return path

    def test_none_is_chosen_without_a_word(self, path: Path) -> None:
        with pytest.raises(ValueError, match=r"dino.pth: .* two networks, .*say which by key='teacher' or"):
            effvit.load_checkpoint(small(), path)

    @pytest.mark.parametrize(("key", "value"), [("teacher", 1.0), ("student", 2.0)])
    def test_named_one_is_loaded(self, path: Path, key: str, value: float) -> None:
        model = small()
        effvit.load_checkpoint(model, path, key=key)
        assert model.head.weight.unique().tolist() == [value]

    def test_name_that_is_not_there_lists_the_others(self, path: Path) -> None:
        with pytest.raises(ValueError, match=r"no weights under 'model', only under \['student', 'teacher'\]"):
            effvit.load_checkpoint(small(), path, key="model")

    def test_command_line_has_the_choice(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        state = timm.create_model("vit_nano_patch4_28").state_dict()
        torch.save({"student": state, "teacher": state}, tmp_path / "dino.pth")
        command = ["convert", str(tmp_path / "dino.pth"), "--model", "vit_nano_patch4_28"]
        assert main(command) == 2
        assert "--key on the command line" in capsys.readouterr().err
        assert main([*command, "--key", "teacher"]) == 0

    def test_mmengine_has_the_choice(self, path: Path) -> None:
        backbone = pytest.importorskip("effvit.dense.openmmlab").EffViT
        settings = {"img_size": 28, "pretrained": str(path)}
        state = timm.create_model("vit_nano_patch4_28").state_dict()
        torch.save({"student": {k: v + 1 for k, v in state.items()}, "teacher": state}, path)
        with pytest.raises(ValueError, match="pretrained_key in a config"):
            backbone("vit_nano_patch4_28", **settings).init_weights()
        model = backbone("vit_nano_patch4_28", pretrained_key="teacher", **settings)
        model.init_weights()
        assert torch.equal(model.model.cls_token, state["cls_token"])

    def test_names_that_become_one_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"holds head\.bias of several networks"):
            official_state_dict({"module.head.bias": torch.zeros(5), "head.bias": torch.ones(5)})


WIDTH = 24
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "positions without rows": ({"pos_embed": torch.zeros(1, 0, WIDTH)}, "pos_embed has shape"),
    "positions of one row": ({"pos_embed": torch.zeros(1, 1, WIDTH)}, "pos_embed has shape"),
    "positions of no square": ({"pos_embed": torch.zeros(1, 48, WIDTH)}, "is no table .* of a square of patches"),
    "positions of two dimensions": ({"pos_embed": torch.zeros(17, WIDTH)}, "pos_embed has shape"),
    "positions without width": ({"pos_embed": torch.zeros(1, 17, 0)}, "pos_embed has shape"),
    "positions of two images": ({"pos_embed": torch.zeros(2, 10, WIDTH)}, "pos_embed has shape"),
    "positions that are NaN": ({"pos_embed": torch.full((1, 17, WIDTH), torch.nan)}, "pos_embed holds NaN or infinity"),
    "kernel of one dimension": ({"patch_embed.proj.weight": torch.zeros(5)}, "is no kernel of patches"),
    "kernel without size": ({"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 0, 0)}, "is no kernel of patches"),
    "kernel of five dimensions": ({"patch_embed.proj.weight": torch.zeros(WIDTH, 3, 1, 4, 4)}, "is no kernel"),
    "kernel of odd length": ({"patch_embed.proj.weight": torch.zeros(WIDTH, 7)}, "cannot be brought to the shapes"),
    "scalars": ({name: torch.zeros(()) for name in TRAINED}, "pos_embed has shape"),
    "empty tensors": ({name: torch.zeros(0) for name in TRAINED}, "pos_embed has shape"),
    "complex": ({"head.bias": torch.zeros(5, dtype=torch.cfloat)}, "head.bias is a complex tensor"),
    "sparse": ({"head.bias": torch.zeros(5).to_sparse()}, r"(?i)sparse"),
    "whole numbers": ({"head.bias": torch.zeros(5, dtype=torch.int8)}, "head.bias holds torch.int8 in place"),
    "truth values": ({"head.bias": torch.zeros(5, dtype=torch.bool)}, "head.bias holds torch.bool in place"),
    "infinity": ({"head.bias": torch.full((5,), torch.inf)}, "head.bias holds NaN or infinity"),
    "a dict for a weight": ({"head.bias": {"data": torch.zeros(5)}}, "head.bias is missing"),
    "a text for a weight": ({"head.bias": "zeros"}, "head.bias is missing"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_odd_weights_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    extra, message = HOSTILE[kind]
    torch.save({**TRAINED, **extra}, tmp_path / "file.pth")
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        effvit.load_checkpoint(model, tmp_path / "file.pth")
    assert len(str(caught.value)) < 1500
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_odd_but_right_weights_load(tmp_path: Path) -> None:
    state = {**TRAINED, "blocks.0.norm1.weight": TRAINED["blocks.0.norm1.weight"].double(), "extra": 3}
    state["head.weight"] = TRAINED["head.weight"].T.contiguous().T  # not contiguous
    state["blocks.1.norm1.bias"] = state["blocks.0.norm1.bias"]  # sharing memory
    torch.save(state, tmp_path / "file.pth")
    model = small()
    assert effvit.load_checkpoint(model, tmp_path / "file.pth") == ["extra"]
    assert torch.equal(model.head.weight, TRAINED["head.weight"])


def nested_tuples(depth: int, container: bytes) -> bytes:
    """A pickle of tuples that hold the one before twice: 2 ** depth entries in 7 bytes a level."""
    inner = b"(K\x01K\x01tq\x00" + b"".join(b"(h%ch%ctq%c" % (i, i, i + 1) for i in range(depth))
    return b"\x80\x02" + container + inner


@pytest.mark.parametrize(
    "content",
    [
        nested_tuples(60, b"}(X\x01\x00\x00\x00a") + b"u.",
        nested_tuples(60, b"") + b".",
        nested_tuples(60, b"}") + b"K\x01s.",  # as a key: hashing it does not end
        b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60)) + b".",  # lists, named empty
    ],
)
def test_pickle_that_would_not_end_is_refused_at_once(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "laugh.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"its pickle holds more than 10000000 entries|cannot be read as a checkpoint"):
        effvit.load_checkpoint(small(), tmp_path / "laugh.pth")


class Code:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return eval, ("1",)


def test_advice_to_switch_protection_off_is_not_passed_on(tmp_path: Path) -> None:
    torch.save({**TRAINED, "extra": Code()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"it asks for (\w+\.)?eval\)") as caught:
        effvit.load_checkpoint(small(), tmp_path / "file.pth")
    assert not re.search("weights_only|safe_globals|trust", str(caught.value))


def test_control_characters_and_megabytes_stay_off_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = timm.create_model("vit_nano_patch4_28").state_dict()
    names = ["neck.\x1b[31mX", "neck.\u202ereversed", "neck." + "x" * 10**6, *(f"neck.{i}" for i in range(5000))]
    path = tmp_path / "odd\x1b[2J.pth"
    torch.save({**state, **{name: torch.zeros(1) for name in names}}, path)
    assert main(["convert", str(path), "--model", "vit_nano_patch4_28"]) == 0
    assert main(["convert", str(path), "--model", "vit_nano_patch4_28", "--key", "\x1b[31m"]) == 2
    torch.save({**state, **{name.replace("neck", "foreign"): torch.zeros(1) for name in names}}, path)
    assert main(["convert", str(path), "--model", "vit_nano_patch4_28"]) == 2
    said = capsys.readouterr()
    assert not re.search("[\x1b\u202e]", said.out + said.err)
    assert "dropped: neck.\\x1b[31mX" in said.out
    assert "more dropped, which --keys names" in said.out
    assert len(said.out + said.err) < 50_000


ODD_TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x.unsqueeze(0),
    lambda x: x.flatten(),
    lambda x: x[:0],
    lambda x: x.sum(),
    lambda x: x.to(torch.int16),
    lambda x: x.to(torch.cfloat),
    lambda x: x / 0,
    lambda x: x.repeat_interleave(2, -1),
    lambda x: x.repeat_interleave(2, 0),
    lambda x: x.transpose(0, -1),
    lambda x: x.half(),
    lambda x: x.to_sparse(),
    lambda x: {"nested": x},
    lambda x: None,
    lambda x: x[..., :-1],
    lambda x: torch.zeros(3, 0, 5),
)


@pytest.mark.parametrize("case", ["vit", "stvit", "sit", "casvit", "supertoken", "lookupvit", "stvit_r_swin"])
def test_mutated_checkpoint_loads_or_is_a_value_error(case: str, tmp_path: Path) -> None:
    """No other exception: 60 files with one to three weights dropped, renamed or of another shape or type."""
    model = small() if case == "vit" else make_architecture(case)
    refused: list[str]
    state, draw, refused = dict(model.state_dict()), random.Random(case), []
    tables = [name for name in state if re.search("pos_embed|patch_embed|stem|position", name)] or list(state)
    for _ in range(60):
        changed: dict[str, Any] = dict(state)
        for key in [*draw.sample(list(state), draw.randrange(2)), draw.choice(tables)]:
            if draw.random() < 0.1:
                changed[f"{key}\x1b"] = changed.pop(key)
            else:
                changed[key] = draw.choice(ODD_TENSORS)(torch.atleast_1d(state[key]).float())
        torch.save(changed, tmp_path / "file.pth")
        try:
            convert_checkpoint(model, tmp_path / "file.pth")
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 40
    assert not [text for text in refused if "\x1b" in text or len(text) > 1500]


def test_safetensors_of_strange_types_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({**TRAINED, "head.bias": torch.zeros(5, dtype=torch.uint8)}, path)
    with pytest.raises(ValueError, match=r"head\.bias holds torch\.uint8"):
        effvit.load_checkpoint(small(), path)
    path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        effvit.load_checkpoint(small(), path)
