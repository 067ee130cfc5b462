"""
Calls of activation functions, seen while a capture is open.

==================  ===========================================================
File                What it knows
==================  ===========================================================
``functions.py``    which functions are activations, and where their units die
``axes.py``         rules for where the units of a tensor are
``trails.py``       which tensor came from which run of which layer
``modules.py``      which modules run
``capture.py``      the mode that joins them, and sees each call
``opening.py``      what is switched on meanwhile, and how it goes back
``sites.py``        names for where an activation is called
``window.py``       a measurement that spans as many batches as it needs
==================  ===========================================================
"""
