"""Trained models as files that other runtimes compute, checked against PyTorch: `hrm export`.

`graphs` takes a model apart into functions of tensors, a file of `formats/` writes them down and computes them
(`format` says what such a file has), `puzzles` finds what to compare them on, `gate` compares, `readme` says how to use
them, and `command` is what the shell calls. `quantize` is `hrm quantize`: the same model in 8 bit.
"""
