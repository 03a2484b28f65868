"""HellaSwag in two protocols."""
