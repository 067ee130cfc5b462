"""
The look at a run's forward passes: a capture while a batch runs, for all windows that want more.
"""
import math
import weakref

from ...faults import in_short
from ...say import warn
from ...statistics.calls import Call
from ..contents import Contents
from ..weights import clean_name
from .capture import Capture
from .experts import alike, of_idle_siblings
from .opening import is_open_elsewhere
from .window import Window


class Looks:
    """
    All windows that are open, and the capture that fills them.

    Args:
        samples (int): examples per measurement
        processes (Processes): that train together
        wants (Callable[[str], bool]): of the path of a layer
        faults (Faults): where failures stay
        needing (Callable): needing(metrics, fields): those of the metrics that need any of some additive fields
        names (Callable[[str], bool]): whether the user names a module of this
            path, so that its activations count wherever they are

    Attributes:
        windows (List[Window]): the same on all processes
        unseen (Dict[str, str]): module path to the reason why activations in it are not seen

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.faults import Faults
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.looks import Looks
        >>> import torch
        >>> looks = Looks(2000, Processes(1, 'cpu'), lambda layer: True, Faults(), lambda metrics, fields: metrics)
        >>> looks.open(['dead_units'], ['away'])
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> looks.look(model, torch.ones(5, 3))
        >>> _ = model(torch.ones(5, 3))
        >>> looks.look_away()
        >>> looks.windows[0].examples, [site.module for site in looks.windows[0].totals()['activations', 'away']]
        (5, ['1'])
    """

    def __init__(self, samples, processes, wants, faults, needing, names=lambda path: False):
        self.windows = []
        self.unseen = {}
        self._samples = samples
        self._processes = processes
        self._wants = wants
        self._faults = faults
        self._needing = needing
        self._names = names
        self._parts = set()    # sites that are only part of an activation that is written out
        self._called = {}      # all sites, and the values at which their units are dead
        self._hidden = set()
        self._alike = []       # modules that are built alike
        self._capture = None
        self._looking = []
        self._refused = False

    def open(self, metrics, fields, start=False, **kwargs):
        """
        Open one window for all metrics that are due.

        Args:
            metrics (List[str]): none is open already, but for the start
            fields (Collection[str]): additive ones that they need
            start (bool): it is of the network before its first step
            **kwargs: see :class:`.window.Window`
        """
        if metrics:
            window = Window(metrics, fields, self._samples, self._processes.replicas, start,
                            on_error=lambda failed: self._faults.fail(self._needing(metrics, failed)), **kwargs)
            window.hidden = set()
            self.windows.append(window)

    def look(self, model, batch, left=math.inf, contents=Contents):
        """
        Watch the next forward pass, if there is a window that wants more.

        Args:
            model (torch.nn.Module):
            batch (Any): that comes next
            left (float): how many batches there will be, this one included
            contents (Callable[[nn.Module], Contents]): gives what the model consists of
        """
        self.look_away()  # where a hook of the model has ended the last batch before its end
        looking = [window for window in self.windows if not window.is_full and self._alive(window)]
        if not looking:
            return
        if is_open_elsewhere():
            if not self._refused:
                self._refused = True
                warn('another run in a thread of this process is being looked at; batches of this one that run '
                     'meanwhile are not')
            return
        with self._faults.guard(_names(looking)):
            for window in looking:
                window.begin_batch(batch, left)
            # Known before it is opened, so that an interrupt finds it.
            own = weakref.ref(self)
            self._looking, found = looking, contents(model)
            self._alike = found.once(alike)
            self._capture = Capture(model, lambda *seen: own()._observe(*seen), lambda *fault: own()._note(*fault),
                                    found, everything=False, names=self._names, parts=self._parts)
            self._capture.__enter__()

    def _observe(self, site, *seen):
        if self._wants(site.layer) or self._wants(site.module):
            call = Call(site, *seen)
            for window in self._looking:
                if self._alive(window):
                    with self._faults.spending(window.metrics):
                        window.add(call)

    def _note(self, path, ex):
        self.unseen.setdefault(path, f'a call that failed: {in_short(ex)}')

    def look_away(self):
        """ Stop watching, and leave nothing behind. """
        if self._capture is None:
            return
        capture = self._capture
        capture.close()
        self._capture = None
        looking, self._looking = self._looking, []
        self._faults.spent(_names(looking), capture.seconds)
        with self._faults.guard(_names(looking)):
            for window in looking:
                window.end_batch()
                self._judge(window, capture)

    def _judge(self, window, capture):
        """ Which of the sites that were seen are hidden layers, as far as this batch tells. """
        window.hidden |= capture.hidden
        window.apart |= dict.fromkeys(capture.parts)
        window.ran |= capture.ran
        window.idle |= {site: values for site, values in capture.empty.items() if site in capture.hidden}
        window.idle |= of_idle_siblings(self._alike, window)
        self.unseen.update(capture.unseen)
        self.unseen.update({site.module: f'{site.function} of what has no axis of units, as the scores of attention'
                            for site in capture.without_units & capture.hidden})
        self._hidden |= window.hidden - window.apart.keys()
        self._called |= capture.values
        self._name_left_out(window)

    def _name_left_out(self, window):
        self.unseen.update({site.module: f'{site.function} {why}' for site, why in window.apart.items()
                            if why and site in window.hidden})
        if window.has_rows:
            self.unseen.update({site.module: f'ranks of features of {site.function}, whose units are spread over '
                                             'processes' for site in window.parts & window.hidden})

    def why_nothing(self):
        """ What there was to see (str), for a metric of activations that was never measured. """
        if not self._called:
            return 'no activation function was seen'
        values = {site: own for site, own in self._called.items() if site in self._hidden}
        if not values:
            return 'no activation that was seen has a trained layer before and after it'
        if not any(values.values()):
            names = ', '.join(sorted({site.function for site in values}))
            return f'no activation that was seen has an output at which a unit is dead: {names}'
        return None

    def next_batch(self):
        """ Note that a batch went by, seen or not. """
        for window in self.windows:
            window.batches += 1

    def asked(self):
        """
        The windows that may have seen enough; what other processes have seen of them is not known yet.

        Returns:
            List[Window]: the same on all processes
        """
        if self._processes.count == 1:
            return [window for window in self.windows if window.is_full]
        return [window for window in self.windows if window.poll.is_due(window.batches)]

    def close(self, window):
        """ Note that a window sees no more. """
        self._name_left_out(window)
        self.windows = [other for other in self.windows if other is not window]

    def drop(self, name):
        """ Forget a metric. """
        for window in list(self.windows):
            window.metrics = [other for other in window.metrics if other != name]
            if not window.metrics:
                self.windows.remove(window)

    def _alive(self, window):
        return any(name not in self._faults.failed for name in window.metrics)


def _names(windows):
    return [name for window in windows for name in window.metrics]


def layer_paths(model):
    """ Names of all modules, as patterns of layers see them. """
    return [clean_name(name) for name, _ in model.named_modules()]
