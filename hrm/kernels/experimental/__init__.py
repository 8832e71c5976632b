"""Backends that do not pay, tested like the others: starting points, and a record of why. See docs/kernels.md.

Nothing outside imports from here, and `auto` looks nowhere in here.
"""
