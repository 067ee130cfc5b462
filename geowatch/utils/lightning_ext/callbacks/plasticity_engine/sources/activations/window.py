"""
What has been seen of the activations for some metrics, until it is enough.

Whether a site is a hidden layer is known only after what comes of it has gone
on, so that numbers are collected first and chosen at the end.
"""
import math

import torch

from ...faults import in_short
from ...schedule import Poll
from ...statistics import Totals
from ...statistics.calls import Call, makers_of
from .examples import count_examples


class Window:
    """
    A measurement of activations that spans as many batches as it needs.

    What fails at one site of several costs that site; what fails at all of them
    is at fault itself.

    Args:
        metrics (List[str]): what it is for
        fields (Collection[str]): additive ones of the source 'activations'
        samples (int): examples that all processes together have to see
        processes (int): how many there are, each with examples of its own
        start (bool): it is of the network before its first step
        on_error (Callable | None): called with the fields that have failed and
            are not made any more; by default an error is raised
        takes (Callable[[Site, int, int], bool]): whether rows of a site are wanted, see :class:`.rows.Rows`

    Attributes:
        examples (int): seen so far
        batches (int): that went by, seen or not: the same on all processes
        hidden (Set[Site] | None): those that are hidden layers; None for all
        apart (Dict[Site, str | None]): those that are left out although they
            are hidden, and why; None for what is only part of an activation
        ran (Set[str]): paths of modules that ran
        idle (Dict[Site, Tuple[float, ...]]): hidden layers that no sample has
            reached, and the values at which their units are dead
        parts (Set[Site]): those of which this process has a part of the units
        values (Dict[Site, Tuple[float, ...]]): the same of all sites that were seen, hidden or not

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.window import Window
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import Call
        >>> import torch
        >>> window = Window(['dead_units'], ['away'], samples=10)
        >>> window.begin_batch({'image': [1, 2, 3, 4, 5, 6]})
        >>> window.add(Call('fc1', torch.tensor([[0., 1.], [0., 0.]]), 1, (0.,)))
        >>> window.end_batch()
        >>> window.examples, window.is_full, window.totals()['activations', 'away']['fc1'].tolist()
        (6, False, [[0.0, 1.0]])
    """

    def __init__(self, metrics, fields, samples, processes=1, start=False, on_error=None,
                 takes=lambda site, units, rows: True):
        self.metrics = metrics
        self.start = start
        self.wanted = math.ceil(samples / processes)
        self.examples = self.batches = 0
        self.poll = Poll()
        # The paper's 2000 rows, and enough for the rank of a wide layer.
        self._makers = makers_of(fields, lambda units: math.ceil(max(samples, 8 * units) / processes), takes)
        self._on_error = on_error
        self.hidden = None
        self.apart, self.ran = {}, set()
        self.idle, self.values = {}, {}
        self.parts = set()
        self._units = {}
        self._sites = {}
        self._seen = set()  # sites of this batch
        self._failed = {}   # maker of statistics to a site of this batch to the error
        self._expected = None
        self._looked_at = ()  # the batch, and the examples it was thought to have

    @property
    def is_full(self):
        """ Whether this process has seen enough. """
        return self.examples >= self.wanted

    @property
    def has_rows(self):
        """ Whether ranks of features are made of it. """
        return any('gram' in maker.fields for maker in self._makers)

    def begin_batch(self, batch, left=math.inf):
        """
        Note that another batch is looked at.

        Args:
            batch (Any):
            left (float): how many batches there will be, this one included, as far as that is known
        """
        examples = count_examples(batch)
        self._looked_at = batch, examples
        self.examples += examples
        if self._expected is None and batch is not None:
            self._expected = max(min(self.wanted, left * examples), examples, 1)
        # A step that fetches its batch by itself has none yet: it may be all there is.
        self._each('begin_batch', 1. if self._expected is None else examples / self._expected)

    def took(self, batch):
        """
        Note which batch a step has had that fetched it by itself, which is known when it is over.

        Args:
            batch (Any): the one that was looked at, for most
        """
        if self._looked_at and self._looked_at[0] is not batch:
            self.examples += count_examples(batch) - self._looked_at[1]
        self._looked_at = ()

    def add(self, call: Call):
        """
        Add one call of an activation function.

        Args:
            call (Call): which several windows may share
        """
        site = call.site
        if self._units.setdefault(site, call.units) != call.units:
            self._leave_out(site, 'of a changing number of units')
        if site not in self.apart:
            self.values[site] = call.values
            self._seen.add(site)
            self.parts |= {site} if call.is_part else set()
            self._at_site('add', site, self._sites.setdefault(site, {}), call)

    def end_batch(self):
        """ Note that the batch is over. """
        self._at_each_site('end_batch')

    def totals(self) -> Totals:
        """
        Returns:
            Totals: what has been seen so far of hidden layers
        """
        self._at_each_site('finish')
        found = {site: own for site, own in self._sites.items()
                 if site not in self.apart and (self.hidden is None or site in self.hidden)}
        totals = {}
        for maker in self._makers:
            for field in maker.fields:
                own = {site: fields[field] for site, fields in found.items() if field in fields}
                own |= self._of_idle(field, own)
                if own:
                    totals['activations', field] = own
        return totals

    def _of_idle(self, field, others):
        """ Fields of layers without a sample: none of their units was ever away from a saturated value. """
        idle = [(site, values) for site, values in self.idle.items()
                if values and site not in self._sites and site not in self.apart]
        if field == 'away':
            device = next((x.device for x in others.values()), 'cpu')
            return {site: torch.zeros(len(values), site.units, device=device) for site, values in idle}
        return {site: 0. for site, _ in idle} if field in {'samples', 'nonfinite'} else {}

    def _leave_out(self, site, why):
        self.apart[site] = why
        self._sites.pop(site, None)
        self._seen.discard(site)
        self._each('forget', site)

    def _each(self, method, *args):
        for maker in list(self._makers):
            try:
                getattr(maker, method)(*args)
            except Exception as ex:
                self._give_up(maker, ex)

    def _at_site(self, method, site, *args):
        for maker in self._makers:
            failed = self._failed.setdefault(maker, {})
            if site not in failed:
                try:
                    getattr(maker, method)(*args)
                except Exception as ex:
                    if self._on_error is None:
                        raise
                    failed[site] = ex

    def _at_each_site(self, method):
        self._seen |= self._sites.keys()
        for site, own in self._sites.items():
            self._at_site(method, site, own, site)
        for maker, failed in self._failed.items():
            if failed and failed.keys() == self._seen:
                self._give_up(maker, *failed.values())
                failed.clear()
        for site, ex in [pair for failed in self._failed.values() for pair in failed.items()]:
            self._leave_out(site, f'that failed: {in_short(ex)}')
        self._seen, self._failed = set(), {}

    def _give_up(self, maker, ex, *others):
        if self._on_error is None:
            raise ex
        self._makers.remove(maker)
        try:
            raise ex
        except Exception:
            self._on_error(maker.fields)
