"""
Where tensors come from: weights, gradients, updates, pieces of a gradient, calls of activation functions.
"""
from .gradients import Gradients
from .pieces import Pieces
from .updates import Updates
from .weights import Weights

# Those of one optimizer step; activations are seen over a window of batches.
STEP_SOURCES = {source.name: source for source in (Weights, Gradients, Updates, Pieces)}
