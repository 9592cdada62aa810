"""The mathematics: tensors in, tensors out.

Truncated SVDs in two metrics, and how their factors are found, shared, pivoted and rounded; no files, no models.

May use: families.
"""
