"""One checkpoint into another: writing, resuming, finishing.

A job knows its steps and its output; how it came about is its command's business.

May use: families, linalg, layouts, methods, machine, storage, solvers, settings, models, planning, calibration,
factoring, healing.
"""
