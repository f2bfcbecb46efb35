"""The source: a checkpoint of safetensors shards, in a folder or streamed from the hub.

A source gives tensors as f32 by name and validates its whole inventory on metadata alone. A streamed one keeps few
shards on the disk at a time. Shards are read without mapping, since a mapped file that shrinks ends the process.
"""
