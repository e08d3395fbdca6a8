"""Options and fixtures of all tests."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden graph texts anew")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """Sizes that one test has seen would be dynamic in the graphs of the next."""
    torch._dynamo.reset()
