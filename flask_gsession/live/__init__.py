"""Changes of sessions as they happen: the listener, and what relies on it."""
