"""Tuning: with all codes fixed, what is continuous in a quantised layer is trained against the source's layer.

Trained are the levels of all groups, norms, the AWQ scale, and attention and router before they are rounded to Q8.
`products` holds the products of stored matrices with their gradients, `student` the layer as stored, `layer` the
training of one layer.

Other shelves use: `layer.tune_layer`, `TuneSettings`, `LayerTuning`; `student.StoredTensor`, `Student`.
"""
