"""
Calls of activation functions, seen while a capture is open.

==================  ===========================================================
File                What it knows
==================  ===========================================================
``functions.py``    which functions are activations, and where their units die
``written.py``      rules for activations that are written out
``layers.py``       rules for which functions are layers
``products.py``     rules for products, where no operand is a weight
``axes.py``         on which axes units are
``moves.py``        rules for where they go
``owners.py``       which tensors are weights, and of which layer
``trails.py``       which tensor came from where, and which activations are hidden layers
``modules.py``      which modules run
``experts.py``      modules that might have run
``sharded.py``      activations of which each process has a part
``capture.py``      the mode that joins them, and sees each call
``opening.py``      what is switched on meanwhile, and how it goes back
``kinds.py``        what is known of a function by its name
``nested.py``       tensors in the arguments and results of a call
``readable.py``     what can be read of an output, unseen by others
``examples.py``     how many examples a batch has
``sites.py``        names for where an activation is called
``window.py``       a measurement that spans as many batches as it needs
==================  ===========================================================
"""
