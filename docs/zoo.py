"""
Write the table of networks whose activations are all seen.

CommandLine:
    python docs/zoo.py > docs/zoo.md
"""
import contextlib
import importlib.util
import sys
import warnings
from pathlib import Path

from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture

HEAD = """# Networks whose activations are all seen

Calls are activation kernels that ran in one forward pass, listed by a `TorchDispatchMode`; units are those that the
layers of the architecture have, read off its modules (`tests/zoo.py`). Ours are those of one capture. Sites are
fewer than calls where a layer runs for several frames or items. Made by `python docs/zoo.py > docs/zoo.md`.

| Network | Calls: true | ours | Sites: true | ours | Units: true | ours | Equal |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"""


def main():
    sys.path.insert(0, str(Path(__file__).parent.parent / 'tests'))
    import zoo
    print(HEAD)
    for network in zoo.NETWORKS:
        if importlib.util.find_spec(network.needs.partition('.')[0]) is None:
            print(f'{network.name}: skipped, since {network.needs} is not installed', file=sys.stderr)
            continue
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter('ignore')
            outcome = zoo.look(network, Capture)
        seen = outcome.seen
        cells = [len(outcome.kernels), len(seen.calls), len(outcome.units), len(seen.sites),
                 sum(outcome.units), sum(seen.units())]
        print('|', network.name, '|', ' | '.join(f'{x:,}' for x in cells), '|', 'yes' if outcome.right() else 'NO', '|')


if __name__ == '__main__':
    main()
