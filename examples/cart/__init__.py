"""A cart whose goods are few and whose buyers are many, on Redis or MongoDB."""
