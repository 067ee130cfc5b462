"""
A registry of rules for torch functions.
"""


class Rules(dict):
    """
    Functions by the names of the torch functions that they are for.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.rules import Rules
        >>> rules = Rules()
        >>> @rules.of('relu', 'gelu')
        >>> def keeps(axis):
        >>>     return axis
        >>> rules['gelu'](3)
        3
    """

    def of(self, *names):
        """
        A decorator that registers a rule.

        Args:
            *names (str): of torch functions

        Returns:
            Callable:

        Raises:
            ValueError: if one of them has a rule already
        """
        def register(rule):
            doubles = [name for name in names if name in self]
            if doubles:
                raise ValueError(f'Expected functions without a rule, but got {", ".join(doubles)}')
            self.update(dict.fromkeys(names, rule))
            return rule
        return register
