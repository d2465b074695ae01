# Dense DeiT-S (2012.12877) with mmseg's recipe for it, the baseline of the methods on it.
_base_ = "mmseg::vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="deit_small_patch16_224",
        img_size=512,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        pretrained=True,
    ),
)
