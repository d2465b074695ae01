# STViT-R on Swin-S (2303.08685, supplement: UPerNet, 240k iterations). No code of it is public; all else is mmseg's
# recipe for Swin-S.
_base_ = "mmseg::swin/swin-small-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="stvit_r_swin_small_patch4_window7_dense",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.3,
    ),
)
train_cfg = dict(max_iters=240000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=240000, by_epoch=False),
]

# Swin's recipe exempts all norms; those of STViT-R's stem are named otherwise.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={f"stem.conv{i}.bn": dict(decay_mult=0.0) for i in (1, 2)}),
)
