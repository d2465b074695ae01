# LookupViT-B/16 (2407.12753) with the losses of both classifiers. Neither code nor training settings are known to us;
# the recipe is DeiT's.
_base_ = "_base_/deit.py"

model = dict(model_name="lookupvit_base_patch16_224")
