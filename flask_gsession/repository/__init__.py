"""Shared by all sessions of an application: find, create, save, rotate, expire, large values."""
