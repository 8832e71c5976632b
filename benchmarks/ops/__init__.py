"""The operations of `hrm.kernels.ops` beside the bars that each has to meet.

- `rows/` has a file for each operation, found by its name: `rows(toy)` returns its lines of the table (`row`);
- `timing` measures calls and what the device can do; `running` runs the rows, in a process apart.
"""
