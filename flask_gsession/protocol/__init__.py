"""Sessions over gRPC: the messages, and the conversion of records and errors to messages and back.

``gsession.proto`` is for clients in any language. ``gsession_pb2`` is generated from it by
``make protocol``; a test compares the two.
"""

import os

# gRPC bypasses Python's logging and writes to stderr: an INFO line for each failed handshake and
# each fork. It reads its variable for that when grpc is imported, so this must run before.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
