"""Tells other services who a visitor is, and serves values of sessions or the store over gRPC."""

from .. import protocol as _before_grpc  # noqa: F401  # it quiets gRPC
