"""Sessions over gRPC: the messages, and how records and errors become messages and back.

``gsession.proto`` is for clients in any language. ``gsession_pb2`` is generated from it by
``make protocol``; a test compares the two.
"""
