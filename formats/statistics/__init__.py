"""What is known of a model's activations, as files: imatrix files of llama.cpp, and files of second moments.

Readers check headers and sizes before they take memory. What statistics mean for rounding is the room `awq`'s part.
"""
