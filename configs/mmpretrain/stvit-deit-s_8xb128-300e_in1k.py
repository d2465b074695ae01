# STViT on DeiT-S (2303.08685). Neither code nor training settings are published for it; the recipe is DeiT's.
_base_ = "_base_/deit.py"

model = dict(model_name="stvit_deit_small_patch16_224")
