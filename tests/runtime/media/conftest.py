"""Fixtures of the media tests."""

from __future__ import annotations

import pytest

from helpers.encoded_clips import Clips


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Clips of many codecs and containers, encoded when a test asks for them."""
    return Clips(tmp_path_factory.mktemp("clips"))
