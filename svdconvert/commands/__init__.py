"""One file per command, as the library calls it.

Each checks a request, plans, and runs a job or measures a model.

May use: families, linalg, layouts, methods, machine, storage, solvers, settings, models, planning, calibration,
factoring, healing, jobs, reports.
"""
