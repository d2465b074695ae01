# Dense: a small plain ViT with patches of 8 pixels. It starts from the weights of configs/mmseg/composites/fcn_vit.py and
# learns ten times slower than the heads, which all read its one map.
_base_ = "_base_/mask-rcnn_composites.py"

strides = [8]

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="deit_tiny_patch16_224",
        patch_size=8,
        embed_dim=128,
        depth=8,
        num_heads=4,
        img_size=128,
        out_indices=(7,),
        out_norm=True,
        init_cfg=dict(type="Pretrained", checkpoint="work_dirs/fcn_vit/iter_2500.pth", prefix="backbone."),
    ),
    neck=dict(
        _delete_=True,
        type="ChannelMapper",
        in_channels=[128],
        out_channels=64,
        kernel_size=3,
        norm_cfg=dict(type="BN"),
        num_outs=1,
    ),
    rpn_head=dict(anchor_generator=dict(strides=strides, scales=[2, 4, 8])),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=strides),
        mask_roi_extractor=dict(featmap_strides=strides),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"backbone": dict(lr_mult=0.1)}))
