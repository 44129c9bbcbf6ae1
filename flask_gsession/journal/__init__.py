"""The journal: what became of every session, for consumers such as a SIEM."""
