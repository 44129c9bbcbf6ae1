"""What all sessions of an application share: find, create, save, rotate, expire, large values."""
