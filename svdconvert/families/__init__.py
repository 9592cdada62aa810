"""What a model is: one row per family, each in a file of its own.

Names, shapes and settings in JSON types; no torch, no disk.

May use: the modules beside it.
"""
