"""Keras on torch, for tests that compare single objects with it."""

import os

import pytest


def against_keras(test):
    """Marks a test that compares with a live Keras."""
    test = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")(test)
    return pytest.mark.keras(test)


def live_keras():
    """The module keras on its torch backend; skips the test where it is not installed."""
    os.environ["KERAS_BACKEND"] = "torch"
    pytest.importorskip("torch")
    return pytest.importorskip("keras")
