# STViT on DeiT-S (2303.08685). No code is published for it. Its section 4.1, read in notes of others on the paper, has
# 300 epochs, batches of 1024, the augmentation and regularisation of DeiT, no distillation and average pooling, all of
# which is so here; what it does not name is DeiT's too.
_base_ = "_base_/deit.py"

model = dict(model_name="stvit_deit_small_patch16_224")
