"""What a truncation costs: one row per method.

The statistics that a method may ask for, and the pair of metrics that it makes of them.

May use: families, linalg, layouts.
"""
