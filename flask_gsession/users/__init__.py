"""The users of an application: which sessions each of them has, and how to end them."""
