"""What is learned of a model by running it on a text.

The text, the statistics, and the folder that keeps them.

May use: families, linalg, layouts, methods, machine, storage, solvers, settings, models, planning.
"""
