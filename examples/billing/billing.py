"""The billing: it sees two keys of the session, and has neither the store nor the secret key.

It could be written in any language that has gRPC.
"""

import os
import secrets
from typing import Any

import grpc
from flask import Flask, abort, redirect, request
from werkzeug.wrappers import Response

from flask_gsession.protocol import gsession_pb2 as pb
from flask_gsession.protocol.methods import methods_of

TIMEOUT = 2.0  # seconds for a call
STATUSES = {"NOT_FOUND": 401, "ABORTED": 409, "PERMISSION_DENIED": 403}


class Values:
    """The calls of `flask_gsession.v1.Values`, each as a method that takes its request."""

    def __init__(self, address: str, token: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._metadata = (("authorization", f"Bearer {token}"),)

    def __getattr__(self, name: str) -> Any:
        method = methods_of("Values")[name]
        call = self._channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.reply.FromString,
        )
        return lambda message: call(message, timeout=TIMEOUT, metadata=self._metadata)


app = Flask(__name__)
values = Values(os.environ["BILLING_SESSIONS"], os.environ["BILLING_TOKEN"])


@app.post("/pay")
def pay() -> Response:
    """Write an invoice for what is in the cart, into the session of the visitor."""
    cookie = request.cookies.get("session", "")
    try:
        reply = values.Get(pb.GetRequest(cookie=cookie, keys=["total"]))
        if not reply.found:  # not an answer of the sessions' server
            abort(503)
        if "total" not in reply.values:
            abort(400, "There is nothing in the cart.")
        invoice = f"{secrets.token_hex(3)} over {reply.values['total'].integer} euros"
        changes = {"invoice": pb.Value(text=invoice)}
        values.Put(pb.PutRequest(cookie=cookie, changes=changes, removals=["total", "cart"]))
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            abort(401, f"No session came with this: open the shop as {os.environ['SHOP_URL']}")
        abort(STATUSES.get(error.code().name, 503))
    return redirect(os.environ["SHOP_URL"])


@app.get("/address")
def address() -> str:
    """Reads a key that the billing has no grant for."""
    cookie = request.cookies.get("session", "")
    try:
        return str(values.Get(pb.GetRequest(cookie=cookie, keys=["address"])))
    except grpc.RpcError as error:
        abort(STATUSES.get(error.code().name, 503))
