"""Where checkpoints come from and what their files hold: folders, headers, the Hub.

Everything that is read is data; nothing of it is executed.

May use: families, linalg, layouts, methods, machine.
"""
