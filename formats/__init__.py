"""What bytes mean: checkpoints, block formats, the HFQ container, imatrix files. Imports nothing of ours."""
