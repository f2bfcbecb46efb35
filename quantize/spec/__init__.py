"""What is asked and what follows from it: recipe, places of sources, plan, metadata, provenance, estimates.

Everything here is known from metadata alone, before the first weight is read.
"""
