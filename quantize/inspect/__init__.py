"""What can be asked of a file or a machine: show, compare, reproduce, inputs for verify, doctor."""
