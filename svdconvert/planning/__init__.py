"""From a request to a plan: targets, ranks, budgets, steps.

From config and headers alone; no torch.

May use: families, linalg, layouts, methods, machine, storage, solvers, settings, models.
"""
