"""For other services: who a visitor is, a session's values, and the store itself over gRPC."""

from .. import protocol as _before_grpc  # noqa: F401  # it quiets gRPC
