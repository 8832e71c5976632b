"""Backends, a file each: the file's name is what `kernels.backend=` calls it, its `BACKEND` says what it needs."""
