"""Blueprints with pages."""
