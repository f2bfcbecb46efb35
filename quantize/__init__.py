"""The pipeline: recipe, plan, build, calibration, inspection and the command line, on top of all other rooms.

A tensor's path is spec → encode → pipeline → write. Calibration gathers what encoding wants to know of a layer's
inputs.
"""
