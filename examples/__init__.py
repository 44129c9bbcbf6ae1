"""Applications that show Flask-GSession at work."""
