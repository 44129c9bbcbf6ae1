"""Integrations with other packages, one per file. Each needs the extra with its name."""
