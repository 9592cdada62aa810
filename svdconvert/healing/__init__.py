"""Factors and scales of a compressed model, trained to the dense model's predictions.

The dense model is streamed once, and what is needed of it lies in files; the compressed one is in memory.

May use: families, linalg, layouts, methods, machine, storage, solvers, settings, models, planning, calibration,
factoring.
"""
