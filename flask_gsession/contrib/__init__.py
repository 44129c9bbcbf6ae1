"""Bridges to other packages, one per file; each needs the extra of its name."""
