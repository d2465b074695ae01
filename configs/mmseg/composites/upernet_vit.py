# Dense: a small plain ViT with patches of 8 pixels, read after each quarter of its blocks.
_base_ = "_base_/upernet_composites.py"

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
        out_indices=(1, 3, 5, 7),
        out_norm=True,
    ),
    decode_head=dict(in_channels=[128, 128, 128, 128]),
    auxiliary_head=dict(in_channels=128),
)
