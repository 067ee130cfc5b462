"""
How metrics are measured: when, from what, over which processes, and where the numbers go.

    Moment -> agenda: which metrics are due -> the union of the statistics that they need
      -> sources yield their tensors once -> additive statistics, on the device
      -> one exchange and one sum over all processes (neither on a single one)
      -> each Gram matrix becomes its spectrum, once -> one transfer to the host
      -> formulas in NumPy -> lines -> sinks

``docs/architecture.md`` says what to touch for what.
"""
