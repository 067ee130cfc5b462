"""
What a test registers is gone after it.
"""
import pytest

from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.functions import SATURATED_VALUES
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

# Before any module of tests has registered one of its own.
BUILT_IN_ACTIVATIONS = tuple(SATURATED_VALUES)


@pytest.fixture(autouse=True)
def registries():
    before = [(registry, dict(registry)) for registry in (METRICS, SATURATED_VALUES)]
    yield
    for registry, content in before:
        registry.clear()
        registry.update(content)
