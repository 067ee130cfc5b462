"""
What is raised for wrong settings.
"""


class PlasticityConfigError(ValueError):
    """
    Settings that cannot be used: says what was expected, what came and what to do.

    Attributes:
        handler (Callable[[str], None] | None): if set, called with each message
            before anything is raised. The host's parser tries one type after
            the other and swallows what a class raises, so that its command
            line would otherwise go on with half a callback.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._errors import PlasticityConfigError
        >>> isinstance(PlasticityConfigError('expected a, but got b'), ValueError)
        True
    """
    handler = None

    def __init__(self, message):
        super().__init__(message)
        if PlasticityConfigError.handler is not None:
            PlasticityConfigError.handler(message)
