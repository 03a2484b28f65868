"""HellaSwag, validation loss, samples."""
