"""Side-by-side benchmarks of Flask session extensions. Run: ``python -m benchmarks --help``.

Reading order: ``views`` (the request), ``backends`` (the extension and the store behind it),
``measure`` (how it is timed), ``matrix`` (every combination), ``targets`` (what we promised).
"""
