"""Everything that judges a file: its structure, its decoding, its distance to the source, its predictions.

`run` takes a file through the stages and makes a report. The stages share one model, which calibration uses too.
"""
