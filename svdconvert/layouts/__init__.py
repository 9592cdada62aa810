"""How a product of low rank is stored: one file per layout.

Names and shapes without torch; the tensors by `linalg`.

May use: families, linalg.
"""
