# CubistMerge (2509.21764) takes 2 rows and 2 columns of 14 out of the grid before the second block: here 4 of 32.
_base_ = "mask2former_dinov3-l_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(sparsify=dict(method="cubistmerge", r_h=4, r_w=4)))
