"""Arguments, presets, schedule, optimizer, one step, checkpoints, tracking."""
