# Expedite (2210.01035) with the defaults of its code, which are for SAM: the fifth block and all behind it see 23 x 23
# clusters of 32 x 32 patches.
_base_ = "mask2former_dinov3-l_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(sparsify=dict(method="expedite")))
