"""What bytes mean: FP8 and block formats, the rotation, the model's tensors, and every file that is read or written.

Nothing here imports another room. Reading an HFQ file needs numpy and xxhash only. Everything that can be wrong with a
file is refused here, by an error that names the file and the tensor.
"""
