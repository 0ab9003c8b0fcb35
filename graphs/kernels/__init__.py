"""`ResidualSelect` on a CUDA GPU: one Triton kernel, its PyTorch entry, and the TensorRT plugin that carries it.

Nothing is imported here: `selection` needs torch and triton, `compiled` triton alone, `tensorrt_plugin` TensorRT too.

`TextGain` has no kernel. It streams V once for its product with a few text rows and once for the norms: at N 576,
D 4096 in float32 that is 2 × 9.4 MB, 6 µs at an H100's 3.35 TB/s, in a handful of operators without a loop, which
runtimes fuse and CUDA graphs capture. A kernel could save half of that, beside a selection of some 100 µs.
"""
