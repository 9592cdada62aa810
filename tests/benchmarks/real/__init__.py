"""Real trained models, fetched as packages, and what is left of them when they are factored.

``subjects`` makes the models, ``rows`` says what is measured, ``losses`` measures it on WikiText-2, ``law`` compares
predicted with measured losses, ``questions`` gets those that ``answers`` asks by lm-evaluation-harness, and ``book``
writes the tables. All but ``rows`` are commands; ``python -m tests.benchmarks.real`` runs them.
"""
