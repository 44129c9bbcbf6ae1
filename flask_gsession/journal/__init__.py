"""The journal: the events of every session, for consumers such as a SIEM."""
