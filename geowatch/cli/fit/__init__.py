"""
`geowatch fit`: trains a fusion model, with plasticity metrics if asked.

Python prefers a package to a module of the same name, so that this package
stands before the host's ``geowatch/cli/fit.py`` while it is installed.
"""
import sys

import scriptconfig as scfg
import ubelt as ub

CALLBACK = 'geowatch.utils.lightning_ext.callbacks.plasticity.PlasticityMonitor'
PREFIX = 'plasticity_'
_HELP = {'-h', '--help'}


def _help(text, default):
    """ Help with what holds if a flag is not given: its own value is None then, which says nothing. """
    return f'{ub.paragraph(text)} (default: {default}%(default).0s)'


class FitCLI(scfg.DataConfig):
    """
    Train a fusion model, and show whether it is losing its ability to learn.

    All arguments but those listed here go untouched to the fusion CLI. To see
    the fusion CLI's own:

        python -m geowatch.tasks.fusion fit --help

    Without any of these flags nothing is measured.

    Example:
        >>> from geowatch.cli.fit import FitCLI
        >>> args = ['--config=a.yaml', '--plasticity_metrics', 'erank', '--trainer.max_steps=4']
        >>> config, fusion_args = FitCLI.parse(args)
        >>> fusion_args[:2]
        ['--config=a.yaml', '--trainer.max_steps=4']
        >>> print('\\n'.join(config.callback_args()))
        --trainer.callbacks+=geowatch.utils.lightning_ext.callbacks.plasticity.PlasticityMonitor
        --trainer.callbacks.metrics=erank
    """
    __command__ = 'fit'
    __alias__ = ['fusion_fit']
    __epilog__ = ub.codeblock(
        '''
        example:
          geowatch fit --config=train.yaml --plasticity_metrics=weight_mag,erank@epoch
        ''')

    # No doctest in the help; python -OO leaves all of it out.
    __description__ = (__doc__ or '').partition('Example:')[0]

    plasticity_metrics = scfg.Value(None, type=str, help=_help(
        '''
        what to measure: names or groups separated by commas, or 'all', each
        with its own interval or none, as in weight_mag@1,ranks@epoch
        ''', 'paper,update_ratio'))
    plasticity_interval = scfg.Value(None, type=str, help=_help(
        '''
        how often: a number of optimizer steps, 'epoch', a duration such as
        '5 minutes', or 'auto', that is weights and gradients every
        log_every_n_steps of the trainer, all else once per epoch
        ''', 'auto'))
    plasticity_source = scfg.Value(None, type=str, help=_help(
        '''
        where activations are seen: 'validation', 'train', or 'auto', that is
        validation where there is a loader for it
        ''', 'auto'))
    plasticity_samples = scfg.Value(None, type=str, help=_help('examples per activation measurement', 2000))
    plasticity_layers = scfg.Value(None, type=str, help=_help('patterns of layer names, separated by commas', 'all'))
    plasticity_per_layer = scfg.Value(None, isflag=True, help=_help('log every layer to TensorBoard too', False))
    plasticity_budget = scfg.Value(None, type=str, help=_help(
        '''
        largest share of the training time, such as 0.02: what is too
        expensive is measured less often
        ''', 'no limit'))
    plasticity_prog_bar = scfg.Value(None, isflag=True, help=_help('show two values in the progress bar', False))

    def argparse(self, parser=None, **kwargs):
        # The modal command of the host makes its parser here, and refuses what
        # that parser does not know: it is shown our own arguments only.
        parser = super().argparse(parser, **kwargs)
        parse_ours = parser.parse_known_args

        def parse_known_args(args=None, namespace=None):
            ours, fusion_args = _split(sys.argv[1:] if args is None else args)
            if not _HELP.isdisjoint(ours):
                _list_metrics(parser)
            namespace, unknown = parse_ours(ours, namespace)
            namespace.fusion_args = fusion_args
            return namespace, unknown

        parser.parse_known_args = parse_known_args
        return parser

    @classmethod
    def parse(cls, args=None):
        """
        Separate our flags from the fusion CLI's.

        Args:
            args (List[str] | None): defaults to those of the process

        Returns:
            Tuple[FitCLI, List[str]]: our flags, and what is not ours
        """
        values = vars(cls().argparse().parse_args(args))
        fusion_args = values.pop('fusion_args')
        return cls(**values), fusion_args

    def callback_args(self):
        """
        Arguments of the fusion CLI that add the callback.

        Returns:
            List[str]: empty if no plasticity flag is given

        Raises:
            PlasticityConfigError: if a flag cannot be read
        """
        given = {key.removeprefix(PREFIX): value for key, value in self.items() if value is not None}
        if not given:
            return []
        if 'samples' in given:
            try:
                given['samples'] = int(given['samples'])
            except (TypeError, ValueError):
                pass  # the callback says what it expected
        from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
        PlasticityMonitor(**given)
        return [f'--trainer.callbacks+={CALLBACK}',
                *(f'--trainer.callbacks.{key}={value}' for key, value in given.items())]

    @classmethod
    def main(cls, cmdline=1, **kwargs):
        """
        Train.

        Args:
            cmdline (bool | List[str]): whether to read the command line
            **kwargs: values of the flags; ``fusion_args`` are those of the
                fusion CLI.
        """
        if cmdline:
            config, fusion_args = cls.parse(cmdline if isinstance(cmdline, list) else None)
        else:
            fusion_args = kwargs.pop('fusion_args', [])
            config = cls(**kwargs)
        from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
        from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import PlasticityConfigError
        # Wrong settings end the command with code 2, be they found in a flag,
        # in the config or, as a layer that is not there, with the model.
        PlasticityConfigError.handler = _error
        try:
            # The fusion CLI reads sys.argv, and Lightning starts the other
            # processes of a run with it.
            callback_args = config.callback_args()
            if callback_args:
                PlasticityMonitor.why_one = (
                    'the config and from --plasticity_* flags. Set its arguments in the config, or take it out of '
                    'there and give all of them as flags')
            argv, sys.argv = sys.argv, [sys.argv[0], 'fit', *fusion_args, *callback_args]
            try:
                # Its result is no exit status: the `geowatch` script would exit with 1.
                _import_host().main()
            finally:
                sys.argv = argv
        finally:
            PlasticityConfigError.handler = PlasticityMonitor.why_one = None


def _list_metrics(parser):
    # The host's packages around the registry take long to import, so that only the help waits for them.
    from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import GROUPS, METRICS, members
    names = [f'{group} ({", ".join(members(group))})' for group in GROUPS if members(group)]
    names += [name for name, metric in METRICS.items() if metric.group is None]
    (action,) = [action for action in parser._actions if action.dest == f'{PREFIX}metrics']
    listed = f'. Groups, and metrics in them: {"; ".join(names)}'
    action.help = action.help.removesuffix(listed) + listed


def _error(message):
    print(f'geowatch fit: error: {message}', file=sys.stderr)
    sys.exit(2)


def _import_host():
    try:
        from geowatch.tasks.fusion import fit_lightning
    except ImportError as ex:
        sys.exit(f'geowatch fit needs geowatch, which cannot be imported ({ex}). '
                 'Install it with: pip install geowatch')
    return fit_lightning


def _split(args):
    """ Our arguments, with the values that follow them, and all others. """
    ours, others = [], []
    takes_value = False
    for arg in args:
        written = arg.partition('=')[0].replace('-', '_')  # scriptconfig takes dashes for the underscores of a name
        is_ours = written.startswith((f'__{PREFIX}', f'__no_{PREFIX}')) or arg in _HELP
        if is_ours or (takes_value and not arg.startswith('-')):
            ours.append(arg)
        else:
            others.append(arg)
        takes_value = is_ours and '=' not in arg
    return ours, others


__cli__ = FitCLI
main = FitCLI.main
