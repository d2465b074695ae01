"""The zoo in Hugging Face's transformers: what its heads take as a backbone (``AutoBackbone``).

Importing this module registers ``EffViTConfig`` with ``AutoConfig`` and ``EffViTBackbone`` with ``AutoBackbone``.
"""

from __future__ import annotations

from effvit.requirements import optional

with optional("transformers", "transformers", "effvit.dense.transformers"):
    import transformers  # noqa: F401

from os import PathLike
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from effvit.dense.backbone import DenseBackbone
from effvit.protocols import Settings

__all__ = ["EffViTBackbone", "EffViTConfig"]


class Part(Protocol):
    """A module of timm as transformers meets it, perhaps with buffers that are computed and in no file."""

    _is_hf_initialized: bool

    def init_non_persistent_buffers(self) -> None: ...


DERIVED = ("out_features", "out_indices", "stage_names")  # what the options say already


class EffViTConfig(BackboneConfigMixin, PretrainedConfig):
    """What an ``EffViTBackbone`` is made of.

    Attributes:
        options: Arguments of ``effvit.dense.backbone.DenseBackbone``: "model_name", "out_indices", settings of the
            method ...
    """

    model_type = "effvit"

    def __init__(self, options: Settings | None = None, **kwargs: Any) -> None:
        self.options = options or {}
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What a file holds: the options, and what transformers notes."""
        return {name: value for name, value in super().to_dict().items() if name not in DERIVED}


class EffViTBackbone(BackboneMixin, PreTrainedModel):
    """``effvit.dense.backbone.DenseBackbone`` as a backbone of transformers.

    ``pretrained`` weights are loaded here; ``from_pretrained`` takes those of the folder instead.

    Raises:
        ValueError: As ``DenseBackbone``; from ``from_pretrained``, a file that lacks weights of the backbone.
    """

    config_class = EffViTConfig
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: EffViTConfig) -> None:
        options: dict[str, Any] = config.options
        backbone = DenseBackbone(**options)
        super().__init__(config, timm_backbone=backbone.features)
        self.backbone = backbone
        if not next(backbone.parameters()).is_meta:  # as transformers builds models whose weights it is about to load
            backbone.load_pretrained()
            for module in backbone.modules():
                cast(Part, module)._is_hf_initialized = True
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Compute the buffers of a module that no file holds; any other of its tensors should have been in it."""
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        unsaved = module._non_persistent_buffers_set
        missing = [name for name, x in tensors if name not in unsaved and not getattr(x, "_is_hf_initialized", False)]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {', '.join(missing)} of a {type(module).__name__} of the backbone; load one of "
                "the same model, or build the model from its config and load what there is by load_pretrained"
            )
        if unsaved:
            cast(Part, module).init_non_persistent_buffers()

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """As transformers, with the settings that the method has now."""
        self.config.options = self.backbone.options()
        super().save_pretrained(save_directory, **kwargs)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        """Images (B, 3, H, W) -> ``feature_maps``, one (B, C_i, H_i, W_i) for each of ``out_indices``."""
        return BackboneOutput(feature_maps=self.backbone(pixel_values))


AutoConfig.register(EffViTConfig.model_type, EffViTConfig)
AutoBackbone.register(EffViTConfig, EffViTBackbone)
