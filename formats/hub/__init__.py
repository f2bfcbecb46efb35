"""The transport to the hub: requests, redirects, retries and the bytes of files, verified by their hashes.

It knows repositories and files, and nothing of checkpoints.
"""
