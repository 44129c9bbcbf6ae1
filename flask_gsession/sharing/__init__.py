"""For other services: who a visitor is, a session's values, and the store itself over gRPC."""
