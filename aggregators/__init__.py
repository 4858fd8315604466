"""The merge core: every method of the model-fusion literature, tensors in and tensors out."""
