"""Calibration: the source runs on tokens, layer by layer, and second moments of what matrices see are kept.

Moments go into a folder, or straight into the build that asks for them.
"""
