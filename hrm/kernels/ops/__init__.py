"""Operations, one file each, that backends are built of.

An operation works on tensors of any model: it knows no backend, no block and no configuration. Its file begins with
what it computes and the shapes it takes, keeps its kernels private, and offers functions with a backward where one is
needed; an operation of several kernels is a folder. Its definition is in `hrm.kernels.naive`, which its tests compare
it with.

- `triton/` is written in Triton and runs on every NVIDIA GPU it knows, and in Triton's interpreter on a CPU;
- `hopper/` is written by hand in Gluon for Hopper GPUs; the operations in `triton/` call it where it is faster.

What files of a folder share lies in its `common.py`. All of them import Triton: import them where it is known to be
installed.
"""
