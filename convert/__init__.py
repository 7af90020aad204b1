"""Convert PyTorch checkpoints to workdirs and back, without PyTorch."""
