"""Faults in real servers under a real load, with checks of the sessions: ``make faults``."""
