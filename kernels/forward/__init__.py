"""Products, norms, attention and routing of the forward pass, straight from packed weights."""
