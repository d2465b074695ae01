# DiffRate off the shelf on DeiT-S (2305.17997): the schedule searched for 2.9 GMACs, compression_rate.json of
# OpenGVLab/DiffRate@91ae3e3.
_base_ = "_base_/off_the_shelf.py"

model = dict(model_name="diffrate_deit_small_patch16_224", preset="deit_small_2.9")
