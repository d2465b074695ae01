# Dense: a small plain ViT with patches of 8 pixels.
_base_ = "_base_/mask-rcnn_composites.py"

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
    ),
    neck=dict(
        _delete_=True, type="SimpleFeaturePyramid", in_channels=128, out_channels=64, scales=(2.0, 1.0, 0.5), num_outs=5
    ),
)
