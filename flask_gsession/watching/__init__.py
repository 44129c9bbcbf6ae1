"""See what happens to sessions: the debug dump, the trace of a request, and what these hide."""
