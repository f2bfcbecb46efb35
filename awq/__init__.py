"""From statistics of activations to importances and scales.

An importance says how much an error in each input channel costs. It is read from an imatrix or from second moments,
which lean on others where their tokens are few. The AWQ scale of a layer follows from it.
"""
