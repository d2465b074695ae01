# Pretrained: the TinyViT-5M encoder of MobileSAM (2306.14289; weights Apache-2.0), distilled from SAM at 1024 px.
#   python tools/get_data.py mobile_sam  # link its folder to data/mobile_sam
# The backbone learns ten times slower than the rest, and its BatchNorm keeps the statistics of the file: our choice.
# Under new norms for its maps (out_norm) the heads stay at chance in so short a training.
_base_ = "_base_/mask-rcnn_composites.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="tiny_vit_5m_224",
        pretrained="data/mobile_sam/mobile_sam.pt",
        out_indices=(0, 1, 2, 3),
        norm_eval=True,
    ),
    neck=dict(in_channels=[64, 128, 160, 320]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"backbone.features": dict(lr_mult=0.1)}))
