"""What training needs of stored matrices: values from codes and levels, and from their gradients those of the levels.

Other rooms use `levels`.
"""
