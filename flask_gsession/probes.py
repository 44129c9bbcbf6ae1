"""Pages for a load balancer."""

from .pages.health import health_blueprint

__all__ = ["health_blueprint"]
