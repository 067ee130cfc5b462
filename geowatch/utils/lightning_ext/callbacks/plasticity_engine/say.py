"""
What we say to people: what cannot be said is no reason to end a run.
"""
import io
import sys
import warnings


def say(text: str, uncut: bool = False):
    """
    Print, where it can be printed.

    A pipe may be closed, a disk full, a terminal without some letters. What
    cannot be written is not left in the buffer either, where the next one to
    print would fail with it.

    Args:
        text (str):
        uncut (bool): if True, rich's progress bar does not break it into
            lines, so that a command can be copied

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.say import say
        >>> say('PlasticityMonitor: größe is not measured')
        PlasticityMonitor: größe is not measured
    """
    stream = sys.stdout
    try:
        text = text.encode(stream.encoding or 'utf-8', 'backslashreplace').decode(stream.encoding or 'utf-8')
        console = getattr(stream, '_FileProxy__console', None) if uncut else None
        if console is not None:
            console.print(text, soft_wrap=True, markup=False, highlight=False)
        elif type(stream) is io.TextIOWrapper and isinstance(stream.buffer, io.BufferedWriter):
            stream.flush()
            data = memoryview(f'{text}\n'.encode(stream.encoding))
            while data and (written := stream.buffer.raw.write(data)):
                data = data[written:]
        else:
            print(text)
    except Exception:
        pass


def warn(text: str):
    """
    Warn, in a line that begins with our name; where warnings are errors, print.

    Args:
        text (str):

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.say import warn
        >>> import warnings
        >>> with warnings.catch_warnings():
        >>>     warnings.simplefilter('error')
        >>>     warn('no log folder')
        PlasticityMonitor: no log folder
    """
    text = f'PlasticityMonitor: {text}'
    try:
        warnings.warn(text, stacklevel=3)
    except Exception:
        say(text)
