"""What a model is: one row per family, in a file of its own or with its relatives.

Names, shapes and settings in JSON types; no torch, no disk.

May use: the modules beside it.
"""
