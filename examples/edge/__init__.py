"""A shop with a branch that keeps selling while its line to the head office is cut: `make edge`.

Three processes: `sessions.py` serves the sessions of the head office by gRPC, and `shop.py` runs
twice, at the head office and at the branch. `__main__.py` starts them, and is the line between.
"""
