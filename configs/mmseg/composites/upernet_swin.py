# Dense: a narrow Swin (2103.14030).
_base_ = "_base_/upernet_composites.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="swin_tiny_patch4_window7_224",
        embed_dim=48,
        depths=(1, 1, 6, 1),
        num_heads=(2, 4, 8, 16),
        out_indices=(0, 1, 2, 3),
        out_norm=True,
    ),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
