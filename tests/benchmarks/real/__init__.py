"""Real trained models, fetched as packages, and what is left of them when they are factored.

``subjects`` makes the models, ``rows`` says what is measured, ``losses`` measures it on WikiText-2, ``law`` compares
predicted with measured losses, ``questions`` gets those that ``answers`` asks by lm-evaluation-harness, ``texts``
calibrates on the texts of ``corpora`` and tests on each, and ``book`` writes the tables, with ``text_tables``. All but
``rows``, ``corpora`` and ``text_tables`` are commands; ``python -m tests.benchmarks.real`` runs them.
"""
