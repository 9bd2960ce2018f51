"""From a checkpoint on disk to one rank's tensors."""
