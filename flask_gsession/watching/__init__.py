"""Debugging: the debug dump, the trace of a request, and the redaction of secrets."""
