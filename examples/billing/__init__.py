"""A shop and its billing, two services that share a session by gRPC.

`python -m examples.billing` starts three processes on this machine: the server of the sessions, the
shop, and the billing. The shop has the whole session. The billing may read the cart and write the
invoice, and nothing else: see `GRANTS` in `__main__.py`.
"""
