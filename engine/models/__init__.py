"""What a model is: its shape from config.json, its tensors by name, its forward pass."""
