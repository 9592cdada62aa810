"""How a product of low rank is stored: one file per layout, and the table of all.

A layout is a row (:class:`svdconvert.layouts.row.Layout`): names, shapes and costs without torch, and the verbs on its
tensors, which import torch when they are called. To add one, write its file and name it in ``table.py``.

May use: families, linalg.
"""
