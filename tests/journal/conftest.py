"""The stores that keep a journal."""

import pytest


@pytest.fixture(params=["memory", "sqlite", "redis", "mongodb"])
def store_url(request: pytest.FixtureRequest) -> str:
    """A `SESSION_STORE` URL of each of them in turn."""
    if request.param == "memory":
        return "memory://"
    kind = {"mongodb": "emptied_mongodb"}.get(request.param, request.param)
    url: str = request.getfixturevalue(f"{kind}_url")
    return url
