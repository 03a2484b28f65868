"""The pretraining application: what combines all other rooms."""
