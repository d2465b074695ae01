# SETR (2012.15840) with the progressive upsampling decoder, mmseg's recipe for ViT-L, on ViT-B: the naive one's, with
# four convolutions that double the resolution each, 3 x 3 in every head, and a tenth of the learning rate.
_base_ = "setr_naive_vit-b.py"

model = dict(
    decode_head=dict(num_convs=4, up_scale=2, kernel_size=3),
    auxiliary_head=[dict(head, kernel_size=3) for head in _base_.model.auxiliary_head],
)
optimizer = dict(lr=0.001)
optim_wrapper = dict(optimizer=dict(lr=0.001))
