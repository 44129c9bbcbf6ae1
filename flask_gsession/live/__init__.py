"""Reports changes of sessions as they happen."""
