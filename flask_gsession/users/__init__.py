"""The users of an application: their sessions, and how to end them."""
