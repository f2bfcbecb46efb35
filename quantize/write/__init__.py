"""Bytes on the disk: the unfinished file, its journal, and files that are replaced as a whole.

Nothing here knows what the bytes mean. Nothing half-written ever carries a final name.
"""
