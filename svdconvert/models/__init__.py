"""A model on a device, whole or block by block.

Loading, running and looking at it; code in a model's folder is never run.

May use: families, linalg, layouts, methods, machine, storage, solvers, settings.
"""
