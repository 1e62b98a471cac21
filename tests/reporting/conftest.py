"""The browser that all tests of pages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .browser import NAMES, Browser, find_chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip(f"no Chromium on PATH ({', '.join(NAMES)}): Debian's package is called chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as one:
        yield one
