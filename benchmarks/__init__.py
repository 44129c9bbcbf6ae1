"""Side-by-side benchmarks of Flask session extensions. Run: ``python -m benchmarks --help``.

Reading order: ``views`` (what a request does), ``backends`` (who does it, on which store),
``measure`` (how it is timed), ``matrix`` (every combination), ``targets`` (what we promised).
"""
