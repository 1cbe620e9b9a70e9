"""Options of the whole test suite."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run what takes many minutes, and longer schedules")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="needs --long"))
