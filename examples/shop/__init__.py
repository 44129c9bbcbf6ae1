"""Larch & Linen: a small shop whose carts, sign-ins and preferences live in Flask-GSession."""
