# Zero-TPrune off the shelf on DeiT-S (2305.17328). No code is published; the schedule is quoted by others and not
# confirmed by the authors, so this is none of their published models.
_base_ = "_base_/off_the_shelf.py"

model = dict(model_name="zero_tprune_deit_small_patch16_224", preset="quoted_deit_small")
