"""What a user asks for.

Options, their defaults and their help, once for the command line, the library and the records.

May use: families, linalg, layouts, methods, machine, storage, solvers.
"""
