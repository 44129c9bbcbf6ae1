"""One request and one session: the mapping, its lifecycle, and the retry loop that writes."""
