"""Faults in real servers under a real load, and what became of the sessions: ``make faults``."""
