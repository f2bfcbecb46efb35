"""How far models are from a reference: layer by layer, and at the head over a part of the vocabulary at a time."""
