"""
Activation calls and units of many networks against a count of the kernels that ran.
"""
import warnings

import pytest
import zoo
from zoo import NETWORKS

from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import site_names


@pytest.mark.parametrize('network', NETWORKS, ids=[network.name for network in NETWORKS])
def test_calls_and_units(network):
    pytest.importorskip(network.needs, reason=f'{network.name} needs {network.needs}, which is not installed')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # those of the networks themselves
        outcome = zoo.look(network, Capture)
    assert outcome.kernels
    if network.name == 'TransformerEncoder, eval':
        assert {name for name, _ in outcome.kernels} == {'fast path'}
        assert len(outcome.seen.calls) == len(outcome.kernels)
    else:
        assert outcome.seen.kernels(network.written) == outcome.kernels  # names and shapes, in order
    assert sorted(outcome.seen.units()) == sorted(outcome.units)
    # All are hidden layers, but for the activations of outputs.
    assert sorted(site.layer for site in outcome.seen.sites if site not in outcome.hidden) == sorted(network.outputs)
    # The axis of each call is the one of that size: hardly ever do two have it.
    ambiguous = sum(shape.count(shape[axis]) > 1 for _, shape, axis in outcome.seen.calls)
    assert ambiguous <= 6
    names = site_names(outcome.seen.sites)
    assert len(set(names.values())) == len(names)
    assert not any(part in name for name in names.values() for part in ('_orig_mod', ':relu/', 'module.'))


def test_the_count_can_fail():
    """ Of a capture that is told of no call nothing is seen, and the comparison says so. """
    class Blind(Capture):
        def called(self, *args):
            pass

    assert not zoo.look(zoo.BY_NAME['U-Net'], Blind).right()
    assert zoo.look(zoo.BY_NAME['U-Net'], Capture).right()


def test_sites_are_the_same_on_every_run():
    first, second = (zoo.look(zoo.BY_NAME['U-Net'], Capture) for _ in range(2))
    assert list(site_names(first.seen.sites).values()) == list(site_names(second.seen.sites).values())
