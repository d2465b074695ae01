# SETR (2012.15840) with the naive decoder, mmseg's recipe for ViT-L, on ViT-B.
_base_ = "mmseg::setr/setr_vit-l_naive_8xb2-160k_ade20k-512x512.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

norm_cfg = dict(type="SyncBN", requires_grad=True)
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
    decode_head=dict(in_channels=768),
    auxiliary_head=[
        dict(
            type="SETRUPHead",
            in_channels=768,
            channels=256,
            in_index=level,
            num_classes=150,
            dropout_ratio=0,
            norm_cfg=norm_cfg,
            act_cfg=dict(type="ReLU"),
            num_convs=2,
            kernel_size=1,
            align_corners=False,
            loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
        )
        for level in range(3)
    ],
)
