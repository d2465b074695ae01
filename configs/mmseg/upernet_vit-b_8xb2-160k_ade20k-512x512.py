# Dense ViT-B (2106.10270, whose pictures lie between -1 and 1) with mmseg's recipe for it, the baseline of the methods
# on it.
_base_ = "mmseg::vit/vit_vit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="vit_base_patch16_224",
        img_size=512,
        out_indices=(2, 5, 8, 11),
        pretrained=True,
    ),
)
