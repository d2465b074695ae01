# ToMe (2210.09461) merges 13 of 196 patches of ViT-B in every block, 6.6 %: here 68 of some 1024.
_base_ = "upernet_dinov3-b_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(sparsify=dict(method="tome", r=68)))
