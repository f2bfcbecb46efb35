"""Tuning: with all codes fixed, what is continuous in a quantised layer is trained against the source's layer.

Trained are the levels of all groups, norms, the AWQ scale, and attention before it is rounded to Q8. `products` holds
the products of stored matrices with their gradients, `student` the layer as stored, `layer` the training of one layer;
`layers` does that for all layers of a file, and `file` makes a new file of it.

Other shelves use: `layer.tune_layer`, `LayerTask`, `LayerTuning`, `TuneSettings`; `student.StoredTensor`;
`file.tune_file`, `TuneOptions`, `TuneResult`.
"""
