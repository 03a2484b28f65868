"""The process and its machine: command line, accelerator, signals, hardware."""
