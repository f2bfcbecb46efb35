"""The command line: options, help and output over the Python interface."""
