"""How a plain truncated SVD is computed: one file per solver, and the table of all.

A solver is a row (:class:`svdconvert.solvers.row.Solver`): where it acts, what it costs, and the factors, for which it
imports torch when it is called. To add one, write its file and name it in ``table.py``.

May use: families, linalg, layouts, methods, machine, storage.
"""
