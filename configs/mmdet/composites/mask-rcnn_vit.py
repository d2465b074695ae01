# Dense: a small ViT with the convolutional stem of LV-ViT (2104.10858), which learns from few pictures.
_base_ = "_base_/mask-rcnn_composites.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="lvvit_small_patch16_224",
        embed_dim=192,
        depth=12,
        num_heads=3,
        img_size=192,
        out_indices=(11,),
        out_norm=True,
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=192, out_channels=64, num_outs=5),
)
