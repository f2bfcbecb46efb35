"""The tiny checkpoint: a model with random weights and a tokenizer, made from nothing and the same everywhere."""
