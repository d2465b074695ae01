# Dense: the ViT of configs/mmdet/composites/mask-rcnn_vit.py, read after each quarter of its blocks.
_base_ = "_base_/upernet_composites.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="lvvit_small_patch16_224",
        embed_dim=192,
        depth=12,
        num_heads=3,
        img_size=192,
        pyramid=True,
        out_norm=True,
    ),
    decode_head=dict(in_channels=[48, 96, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
