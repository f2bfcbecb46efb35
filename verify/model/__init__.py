"""The model in torch from any source of weights, the same model by our kernels, and measures of distance.

What runs the model does not judge it: calibration and the tiny checkpoint stand on this shelf too.
"""
