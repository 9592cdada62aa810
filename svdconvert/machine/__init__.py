"""This machine: processes, threads, devices, memory, Ctrl-C.

Nothing about models.

May use: families, linalg, layouts, methods.
"""
