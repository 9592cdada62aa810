"""What there is to look at: a record or a sweep as one HTML file.

Made from data alone, without scripts, and with nothing from elsewhere. All that came from a file is escaped.

May use: families, linalg, layouts, methods, machine, storage, solvers, settings, models, planning, calibration,
factoring, healing, jobs.
"""
