"""A run's folder: written during training, read and drawn afterwards."""
