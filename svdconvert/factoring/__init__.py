"""The work on matrices: decompositions, refits, and the steps of a plan as tensors.

What is computed once is kept in files, and found there again.

May use: families, linalg, layouts, methods, machine, storage, solvers, settings, models, planning, calibration.
"""
