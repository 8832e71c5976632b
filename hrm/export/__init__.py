"""Trained models as files that other runtimes compute, checked against PyTorch: `hrm export`.

`graphs` writes ONNX files, `puzzles` finds what to compare them on, `gate` compares, `readme` says how to use them, and
`command` is what the shell calls. All but `puzzles` and `readme` need the extra `export`.
"""
