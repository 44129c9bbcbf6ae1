"""The values of a session: one to bytes and back, merging, large ones, the payload as a whole."""
