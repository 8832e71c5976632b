"""The operations of `hrm.kernels.ops` beside the bars that each has to meet.

- `rows/` has a file for each operation, found by its name: `rows(toy)` returns its lines of the table (`row`);
- `timing` measures calls and what the device can do; `__main__` runs the rows, each operation in a process of its own.
"""
