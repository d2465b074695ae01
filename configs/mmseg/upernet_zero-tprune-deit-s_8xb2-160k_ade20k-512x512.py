# Zero-TPrune (2305.17328): its schedule for DeiT-S. The page rank keeps the attention map in memory, which
# grows with the square of the number of patches; `num_iters` of 1 saves most of its time on large pictures.
_base_ = "upernet_deit-s_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="zero_tprune_deit_small_patch16_224", num_iters=1))
