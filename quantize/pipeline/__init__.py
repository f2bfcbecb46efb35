"""The build: what was asked becomes a spec, the spec becomes units of work, workers encode, the file is written.

A build is resumable after any interruption, and its bytes do not depend on the number of workers.
"""
