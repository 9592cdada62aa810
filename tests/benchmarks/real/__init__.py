"""Real trained models, fetched as packages, and what is left of them when they are factored.

``subjects`` makes the models, ``rows`` says what is measured, ``losses`` measures it on WikiText-2, ``table`` writes it
down, ``law`` compares predicted with measured losses, and ``tasks`` asks questions of lm-evaluation-harness. Each is a
command by itself; ``python -m tests.benchmarks.real`` runs them all.
"""
