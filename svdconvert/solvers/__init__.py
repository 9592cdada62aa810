"""How a plain truncated SVD is computed: one row per solver.

Where it acts, what it does not go with, what it says of itself.

May use: families, linalg, layouts, methods, machine, storage.
"""
