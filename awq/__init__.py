"""From statistics of activations to importances and scales.

An importance says how much an error in each input channel of a matrix costs. It is read from an imatrix or from second
moments, and moments of too few tokens lean on the imatrix. The AWQ scale of a layer and the folds follow from it.

Other rooms use: `importance` (Importance and the protocols), `from_imatrix.load_importance`,
`from_moments.load_calibration`, `read_layer` and the records of a calibration, and the two functions of `scale`.
"""
