"""Fixtures of what several losses are computed with."""

from __future__ import annotations

import pytest

from rollouts.training import softmax_rows


@pytest.fixture(params=["compiled", "torch"])
def either_softmax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the compiled rows and with the torch operators that stand in for them."""
    if request.param == "torch":
        monkeypatch.setattr(softmax_rows, "native_library", lambda source: None)
    else:
        request.getfixturevalue("compiler")
