"""Typed session keys, on marshmallow: declared once, checked when you read and write them."""

try:
    import marshmallow as _marshmallow  # noqa: F401  # so that the hint below names the extra
except ImportError as error:  # pragma: no cover
    raise ImportError(
        f"Typed keys need the package {error.name}: install the extra, flask-gsession[typed]"
    ) from None

from .decorators import require_session, use_session
from .keys import SessionKey
from .session_schema import SessionSchema

__all__ = ["SessionKey", "SessionSchema", "require_session", "use_session"]
