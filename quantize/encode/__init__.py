"""Experts of one layer from f32 weights to payloads, on the CPU or on a GPU, with the same bytes.

`layer_encoder` chooses a layer's AWQ scale and turns experts into tasks; `encoders` holds the contract that CPU and GPU
follow. Weights that are too large for their format are refused by name.

Other rooms use: `encoders.open_encoder`, `Encoder`, `CPU`; `layer_encoder.LayerEncoder`, `FitSettings`, `fit_settings`;
`overflow.encode_tensor` for tensors outside the experts; `blas.one_blas_thread`.
"""
