"""Sessions over gRPC: the messages, and how records and errors become messages and back.

``gsession.proto`` is for clients in any language. ``gsession_pb2`` is generated from it by
``make protocol``; a test compares the two.
"""

import os

# gRPC writes past Python's logging to stderr: an INFO line for each failed handshake and each fork.
# Its documented variable for that is read when grpc is imported, so this package comes before it.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
