"""The command line: parses, calls a command, shows the result.

No torch before a command needs it.

May use: families, linalg, layouts, methods, machine, storage, solvers, settings, models, planning, calibration,
factoring, healing, jobs, reports, commands.
"""
