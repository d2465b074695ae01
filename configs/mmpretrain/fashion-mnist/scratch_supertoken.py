# Super-token SViT (2211.11167), three narrow stages on maps of 7, 4 and 2 pixels a side; super tokens in the first two.
_base_ = "_base_/three-epochs.py"

model = dict(
    model_name="supertoken_small_224",
    in_chans=1,
    dims=[64, 96, 192],
    depths=[2, 4, 2],
    num_heads=[2, 3, 6],
    stoken_size=[2, 2, 1],
    n_iter=[1, 1, 1],
    layerscale=[False, False, False],
    projection=384,
)
