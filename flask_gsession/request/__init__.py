"""What one request does with one session: the mapping, its life, and the one loop that writes."""
