# ALGM (2406.09936) on the ViT of upernet_vit.py, with the threshold of its scripts.
_base_ = "upernet_vit.py"

model = dict(backbone=dict(model_name="algm_deit_tiny_patch16_224"))
