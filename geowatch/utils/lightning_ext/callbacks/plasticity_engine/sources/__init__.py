"""
Where tensors come from: weights, gradients, what a step has done, pieces of a gradient, calls of activation functions.
"""
from .distances import Distances
from .gradients import Gradients
from .pieces import Pieces
from .turns import Turns
from .updates import Updates
from .weights import Weights

# Those of one optimizer step; activations are seen over a window of batches.
STEP_SOURCES = {source.name: source for source in (Weights, Gradients, Distances, Turns, Updates, Pieces)}
