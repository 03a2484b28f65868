"""What goes to the Hub: folders that load anywhere."""
