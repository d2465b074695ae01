# Super-token ViT S (2211.11167). No dense code is public: mmseg's recipe for Swin, with a norm for each map and the
# drop path of the classifier (README of hhb072/STViT@c9ed9a4).
_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="supertoken_small_224",
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        drop_path_rate=0.1,
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)

# Swin's recipe exempts all norms; those of the stem and the downsamplings are named otherwise here.
batch_norms = ("stem.2", "stem.5", "stem.8", "stem.11", "downsample.bn")
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={f"{name}.": dict(decay_mult=0.0) for name in batch_norms}),
)
