"""
Where tensors come from: weights, gradients, updates, pieces of a gradient, calls of activation functions.
"""
