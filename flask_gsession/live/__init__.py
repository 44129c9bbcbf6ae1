"""Changes of sessions as they happen."""
