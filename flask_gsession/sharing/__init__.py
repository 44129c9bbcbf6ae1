"""Sessions for other services: the store over gRPC, values of a session, and who somebody is."""
