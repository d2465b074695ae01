# ToMe (2210.09461) merges 23 of 576 patches of ViT-L in every block, 4.0 %: here 41 of some 1024.
_base_ = "mask2former_dinov3-l_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(sparsify=dict(method="tome", r=41)))
