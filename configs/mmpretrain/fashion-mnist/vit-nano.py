# The dense model whose weights the package has.
_base_ = "_base_/fashion-mnist.py"
