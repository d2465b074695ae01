# GTP off the shelf on DeiT-S: the command in the README of Ackesnal/GTP-ViT@a9c7210, which later READMEs leave out. It
# names neither a graph nor token scales, so that main.py and models_v3.py there take the spatial graph and no scales.
_base_ = "_base_/off_the_shelf.py"

model = dict(
    model_name="gtp_deit_small_patch16_224",
    num_prop=4,
    sparsity=1.0,
    alpha=0.1,
    graph_type="Spatial",
    token_scale=False,
)
